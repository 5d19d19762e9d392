"""Policies compute what the stock pipelines compute."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.batch import Condition
from diffalign.diffusion.guidance import guided
from diffalign.diffusion.sampling import sample
from diffalign.errors import UserError
from diffalign.policies import codec, components
from diffalign.policies.components import PipelinePolicy
from diffalign.policies.sd3 import SD3Policy
from diffalign.policies.unet import SDXLPolicy, UNetPolicy, time_ids
from tests.factories import tiny_pipeline, tiny_policy

FAMILIES = ("sd", "sdxl", "sd3")
PROMPTS = ["a red cube", "two", "x"]
NOISE = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(0))


def stock_sample(pipeline: Any, noise: Tensor, **arguments: Any) -> Tensor:
    return pipeline(
        PROMPTS, latents=noise, num_inference_steps=4, output_type="latent", guidance_scale=3.0, **arguments
    ).images


def our_sample(policy: PipelinePolicy, noise: Tensor, sizes: dict[str, Any] | None = None) -> Tensor:
    condition = policy.encode_prompts(PROMPTS)
    if sizes:
        condition = policy.with_size(condition, sizes)
    with policy.inference():
        return sample(guided(policy.predict, condition, policy.null_condition(3), 3.0), policy.process, noise, 4)


@pytest.mark.parametrize("side", [8, 12])
def test_samples_agree_where_levels_shift_with_the_size_of_the_image(side: int) -> None:
    def pipeline() -> Any:
        made = tiny_pipeline("sd3")
        tokens = {"base_image_seq_len": 4, "max_image_seq_len": 64}
        made.scheduler = type(made.scheduler).from_config(made.scheduler.config, use_dynamic_shifting=True, **tokens)
        return made

    policy, noise = SD3Policy(pipeline()), torch.randn(3, 4, side, side, generator=torch.Generator().manual_seed(0))
    pixels = side * policy.codec.downsampling
    policy.process = policy.process_for(pixels, pixels)
    expected = stock_sample(pipeline(), noise, height=pixels, width=pixels)
    torch.testing.assert_close(our_sample(policy, noise), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("family", "steps", "guidance"), [("sd", 50, 7.5), ("sdxl", 50, 5.0), ("sd3", 28, 7.0)])
def test_each_family_is_sampled_as_its_pipeline_unless_told_otherwise(family: str, steps: int, guidance: float) -> None:
    assert tiny_policy(family).usual_sampling == (steps, guidance)


@pytest.mark.parametrize("family", FAMILIES)
class TestAgainstStock:
    def test_samples_agree(self, family: str) -> None:
        policy = tiny_policy(family)
        torch.testing.assert_close(
            our_sample(policy, NOISE), stock_sample(tiny_pipeline(family), NOISE), rtol=1e-4, atol=1e-4
        )

    def test_decoding_agrees(self, family: str) -> None:
        policy, pipeline = tiny_policy(family), tiny_pipeline(family)
        vae = pipeline.vae
        shift = vae.config.shift_factor or 0.0
        with torch.no_grad():
            pixels = vae.decode(NOISE / vae.config.scaling_factor + shift).sample
            torch.testing.assert_close(policy.decode(NOISE), (pixels / 2 + 0.5).clamp(0, 1))

    def test_encoding_agrees(self, family: str) -> None:
        policy, vae = tiny_policy(family), tiny_pipeline(family).vae
        pixels = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
        with torch.no_grad():
            posterior = vae.encode(pixels).latent_dist
        shift, scale = vae.config.shift_factor or 0.0, vae.config.scaling_factor
        torch.testing.assert_close(policy.encode_images(pixels), (posterior.mean - shift) * scale)
        generator = torch.Generator().manual_seed(1)
        drawn = (posterior.sample(torch.Generator().manual_seed(1)) - shift) * scale
        torch.testing.assert_close(policy.encode_images(pixels, generator), drawn)


@pytest.mark.parametrize("family", FAMILIES)
class TestVerbs:
    def test_rows_are_independent(self, family: str) -> None:
        policy = tiny_policy(family)
        condition = policy.encode_prompts(PROMPTS)
        timesteps = policy.process.timestep_at(torch.tensor([10, 500, 900]))
        with torch.no_grad():
            together = policy.predict(NOISE, timesteps, condition)
            for row in range(3):
                rows = slice(row, row + 1)
                alone = policy.predict(NOISE[rows], timesteps[rows], condition.select(rows))
                torch.testing.assert_close(together[rows], alone, rtol=1e-4, atol=1e-5)

    def test_sizes_come_from_the_config(self, family: str) -> None:
        policy = tiny_policy(family)
        assert policy.default_resolution == (16, 16)
        assert policy.latent_shape(16, 32) == (4, 8, 16)
        for size in ((15, 16), (0, 16)):
            with pytest.raises(UserError, match="multiples of"):
                policy.latent_shape(*size)

    def test_null_condition_is_the_empty_caption(self, family: str) -> None:
        policy = tiny_policy(family)
        null, empty = policy.null_condition(2), policy.encode_prompts(["", ""])
        for name, value in empty.tensors.items():
            torch.testing.assert_close(null.tensors[name], value)

    def test_captions_are_encoded_without_mixed_precision(self, family: str) -> None:
        policy = tiny_policy(family)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            null, mixed = policy.null_condition(1), policy.encode_prompts(["", *PROMPTS])
        plain = policy.encode_prompts(["", *PROMPTS])
        for name, value in plain.tensors.items():
            assert torch.equal(mixed.tensors[name], value)
            torch.testing.assert_close(null.tensors[name], value[:1], rtol=1e-5, atol=1e-6)

    def test_text_encoders_wait_in_main_memory_and_come_for_captions(
        self, family: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = tiny_policy(family)
        identity, expected = policy.encoder_id, policy.encode_prompts(PROMPTS)
        here = [torch.device("cpu")]
        monkeypatch.setattr(components, "_place", lambda encoder: here[0])

        def move(encoder: torch.nn.Module, to: Any) -> torch.nn.Module:
            moves.append((type(encoder).__name__, str(to)))
            return encoder

        moves: list[tuple[str, str]] = []
        monkeypatch.setattr(torch.nn.Module, "to", move)
        policy.encode_prompts(["a"])
        assert not moves
        policy.offload_text_encoders()
        count = len(moves)
        assert count == {"sd": 1, "sdxl": 2, "sd3": 2}[family]
        assert all("Text" in name and to == "cpu" for name, to in moves)
        here[0] = torch.device("meta")  # as if inputs were elsewhere
        policy.null_condition(1)
        assert len(moves) == count
        again = policy.encode_prompts(PROMPTS)
        assert [to for _, to in moves[count:]] == ["cpu"] * count + ["meta"] * count
        for name, value in expected.tensors.items():
            assert torch.equal(again.tensors[name], value)
        assert policy.encoder_id == identity

    def test_images_are_coded_without_mixed_precision(self, family: str) -> None:
        policy = tiny_policy(family)
        pixels = policy.decode(NOISE)
        latents = policy.encode_images(pixels)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(policy.decode(NOISE), pixels)
            assert torch.equal(policy.encode_images(pixels), latents)

    def test_decoding_is_differentiable_and_keeps_the_latents_alone(self, family: str) -> None:
        """The gradient is that of the bare VAE to the bit, and its activations are not kept for it."""
        policy, vae = tiny_policy(family), tiny_policy(family)._pipeline.vae
        saved: set[int] = set()

        def keep(value: Tensor) -> Tensor:
            saved.add(value.nbytes)
            return value

        latents = (NOISE * 0.1).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
            pixels = policy.decode(latents)
        assert max(saved) <= pixels.nbytes  # latents, and the pixels that are clamped
        pixels.square().mean().backward()
        assert not policy._pipeline.vae.is_gradient_checkpointing  # as it was

        bare, config = (NOISE * 0.1).requires_grad_(), vae.config
        decoded = vae.decode(bare / config.scaling_factor + (config.shift_factor or 0.0)).sample
        (decoded / 2 + 0.5).clamp(0, 1).square().mean().backward()
        assert latents.grad is not None
        assert latents.grad.abs().sum() > 0
        torch.testing.assert_close(latents.grad, bare.grad)

    def test_everything_starts_frozen(self, family: str) -> None:
        assert not any(p.requires_grad for part in tiny_policy(family).parts for p in part.parameters())

    def test_encoder_id_follows_the_encoders_only(self, family: str) -> None:
        first, second, third = tiny_policy(family), tiny_policy(family, lora=True), tiny_policy(family, seed=1)
        with torch.no_grad():
            for parameter in second.module.parameters():
                parameter += 1
        assert first.encoder_id == second.encoder_id != third.encoder_id

    def test_the_vae_sees_few_pixels_at_once(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        policy = tiny_policy(family)
        pixels, generator = policy.decode(NOISE), torch.Generator()
        latents = policy.encode_images(pixels), policy.encode_images(pixels, generator.manual_seed(0))
        monkeypatch.setattr(codec, "_PIXELS_AT_ONCE", 2 * 16 * 16)
        sizes: list[int] = []
        for half in (policy._pipeline.vae.encoder, policy._pipeline.vae.decoder):
            half.register_forward_pre_hook(lambda module, rows: sizes.append(len(rows[0])))
        torch.testing.assert_close(policy.decode(NOISE), pixels)
        torch.testing.assert_close(policy.encode_images(pixels), latents[0])
        torch.testing.assert_close(policy.encode_images(pixels, generator.manual_seed(0)), latents[1])
        monkeypatch.setattr(codec, "_PIXELS_AT_ONCE", 1)
        policy.decode(NOISE)
        assert sizes == [2, 1] * 3 + [1] * 3


class TestMicroConditioning:
    def test_height_comes_first_and_examples_repeat_in_blocks(self) -> None:
        ids = time_ids(torch.tensor([[1024, 768], [1088, 800]]), torch.tensor([[0, 0], [8, 16]]), (1024, 512), rows=4)
        first, second = [1024, 768, 0, 0, 1024, 512], [1088, 800, 8, 16, 1024, 512]
        assert ids.tolist() == [first, second, first, second]
        with pytest.raises(ValueError, match="do not divide"):
            time_ids(torch.zeros(3, 2), (0, 0), (1, 1), rows=4)

    def test_sizes_reach_the_network_as_in_stock(self) -> None:
        sizes = {"original_size": (48, 32), "crop_top_left": (4, 2), "target_size": (16, 16)}
        stock = stock_sample(
            tiny_pipeline("sdxl"), NOISE, original_size=(48, 32), crops_coords_top_left=(4, 2), target_size=(16, 16)
        )
        ours = our_sample(tiny_policy("sdxl"), NOISE, sizes)
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(ours, our_sample(tiny_policy("sdxl"), NOISE), rtol=1e-3, atol=1e-3)

    def test_families_without_sizes_ignore_them(self) -> None:
        policy = tiny_policy("sd")
        condition = policy.encode_prompts(["a"])
        assert policy.with_size(condition, {"original_size": (1, 1), "target_size": (1, 1)}) is condition

    def test_empty_captions_are_zero_only_where_the_model_says_so(self) -> None:
        assert tiny_policy("sdxl").encode_prompts(["", "a"]).tensors["prompt_embeds"].abs().sum(dim=(1, 2))[0] == 0
        pipeline = tiny_pipeline("sdxl")
        pipeline.register_to_config(force_zeros_for_empty_prompt=False)
        assert SDXLPolicy(pipeline).encode_prompts([""]).tensors["prompt_embeds"].abs().sum() > 0

    def test_conditions_of_different_kinds_do_not_mix(self) -> None:
        policy = tiny_policy("sdxl")
        plain = policy.encode_prompts(["a"])
        sized = policy.with_size(plain, {"original_size": (16, 16), "target_size": (16, 16)})
        with pytest.raises(ValueError, match="time_ids"):
            Condition.cat([plain, sized])
        assert Condition.cat([plain.completed(sized), sized]).tensors["time_ids"].shape == (2, 6)


class TestRefusals:
    def test_inpainting_and_distilled_unets(self) -> None:
        pipeline = tiny_pipeline("sd")
        pipeline.unet.register_to_config(in_channels=9)
        with pytest.raises(UserError, match="9 channels"):
            UNetPolicy(pipeline)
        pipeline = tiny_pipeline("sd")
        pipeline.unet.register_to_config(time_cond_proj_dim=8)
        with pytest.raises(UserError, match="consistency-distilled"):
            UNetPolicy(pipeline)

    def test_latents_that_are_not_finite(self) -> None:
        policy = tiny_policy("sd")
        pixels = torch.zeros(2, 3, 16, 16)
        pixels[1, 0, 0, 0] = torch.inf
        with pytest.raises(UserError, match=r"rows \[1\] of 2"):
            policy.encode_images(pixels)


def test_statistics_of_latents_are_honoured() -> None:
    pipeline = tiny_pipeline("sdxl")
    pixels = torch.rand(2, 3, 16, 16) * 2 - 1
    plain = SDXLPolicy(pipeline).encode_images(pixels)
    mean, std = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=std)
    policy = SDXLPolicy(pipeline)
    scale = pipeline.vae.config.scaling_factor
    expected = (plain / scale - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(std).view(-1, 1, 1) * scale
    torch.testing.assert_close(policy.encode_images(pixels), expected)
    with torch.no_grad():
        torch.testing.assert_close(policy.decode(expected), SDXLPolicy(tiny_pipeline("sdxl")).decode(plain))


def test_third_text_encoder_of_sd3() -> None:
    policy = tiny_policy("sd3", t5=True)
    stock = stock_sample(tiny_pipeline("sd3", t5=True), NOISE)
    torch.testing.assert_close(our_sample(policy, NOISE), stock, rtol=1e-4, atol=1e-4)
    assert policy.encode_prompts(["a"]).tensors["prompt_embeds"][:, 16:].abs().sum() > 0
    assert sum(type(part).__name__ == "T5EncoderModel" for part in policy.companions) == 1


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_prediction_types_reach_the_process(prediction: str) -> None:
    assert tiny_policy("sd", prediction_type=prediction).process.prediction_type == prediction
