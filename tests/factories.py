"""Tiny random models of the real classes, and a toy policy of two numbers; all in code, nothing is fetched.

``tiny_sd()``, ``tiny_sdxl()`` and ``tiny_sd3()`` return policies over real pipelines of some ten thousand weights;
``save_tiny("sd", folder)`` writes such a pipeline. ``ToyPolicy`` runs in microseconds and has gradients in closed form.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign.batch import Condition, ImageBatch
from diffalign.diffusion.process import DiscreteProcess, FlowProcess, NoiseProcess, process_from_scheduler
from diffalign.policies.adapters import AdapterBank, LoraSettings
from diffalign.policies.base import Policy
from diffalign.policies.components import PipelinePolicy
from diffalign.policies.sd3 import SD3Policy
from diffalign.policies.unet import SDXLPolicy, UNetPolicy
from diffalign.rewards.base import Metadata, Reward, RewardInfo

Prediction = Literal["epsilon", "v_prediction", "sample"]
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789,.-"
TINY_LORA = LoraSettings(rank=4)


# --- pipelines of the real classes --------------------------------------------------------------------------------


def clip_tokenizer(folder: Path) -> Any:
    """Make a CLIP tokenizer that knows single letters only."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    (folder / "vocab.json").write_text(json.dumps({token: index for index, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)


def clip_text_encoder(width: int, projection: bool) -> nn.Module:
    """Make a CLIP text encoder of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModelWithProjection(config) if projection else CLIPTextModel(config)


def vae(channels: int = 4, **config: Any) -> Any:
    """Make a VAE that halves each side."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        **config,
    )


def unet(width: int, **config: Any) -> Any:
    """Make a UNet of two levels for 8x8 latents."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=width,
        attention_head_dim=8,
        **config,
    )


def ddim(prediction_type: str) -> Any:
    """Make Stable Diffusion's scheduler."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def sd_pipeline(prediction_type: Prediction = "epsilon") -> Any:
    """Make a ``StableDiffusionPipeline``."""
    from diffusers import StableDiffusionPipeline

    with tempfile.TemporaryDirectory() as folder:
        return StableDiffusionPipeline(
            vae=vae(scaling_factor=0.5),
            text_encoder=clip_text_encoder(16, projection=False).eval(),
            tokenizer=clip_tokenizer(Path(folder)),
            unet=unet(16),
            scheduler=ddim(prediction_type),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def sdxl_pipeline(prediction_type: Prediction = "epsilon") -> Any:
    """Make a ``StableDiffusionXLPipeline`` with two text encoders of widths 16 and 8."""
    from diffusers import StableDiffusionXLPipeline

    micro = {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 8,
        "use_linear_projection": True,
    }
    with tempfile.TemporaryDirectory() as folder:
        return StableDiffusionXLPipeline(
            vae=vae(scaling_factor=0.5),
            text_encoder=clip_text_encoder(16, projection=False).eval(),
            text_encoder_2=clip_text_encoder(8, projection=True).eval(),
            tokenizer=clip_tokenizer(Path(folder) / "1"),
            tokenizer_2=clip_tokenizer(Path(folder) / "2"),
            unet=unet(24, **micro),
            scheduler=ddim(prediction_type),
        )


def t5_parts() -> dict[str, Any]:
    """Make a third text encoder and its tokenizer, which knows single letters only."""
    from transformers import T5Config, T5EncoderModel, T5TokenizerFast

    tokens = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -1.0), *((letter, -2.0) for letter in LETTERS)]
    config = T5Config(vocab_size=len(tokens), d_model=24, d_kv=8, d_ff=24, num_layers=1, num_heads=2)
    return {
        "text_encoder_3": T5EncoderModel(config).eval(),
        "tokenizer_3": T5TokenizerFast(vocab=tokens, extra_ids=0),
    }


def sd3_pipeline(shift: float = 3.0, t5: bool = False) -> Any:
    """Make a ``StableDiffusion3Pipeline``, without the third text encoder unless asked."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=16,
        pooled_projection_dim=24,
        out_channels=4,
        pos_embed_max_size=16,
    )
    with tempfile.TemporaryDirectory() as folder:
        return StableDiffusion3Pipeline(
            transformer=transformer,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=shift),
            vae=vae(scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip_text_encoder(16, projection=True).eval(),
            tokenizer=clip_tokenizer(Path(folder) / "1"),
            text_encoder_2=clip_text_encoder(8, projection=True).eval(),
            tokenizer_2=clip_tokenizer(Path(folder) / "2"),
            **(t5_parts() if t5 else {"text_encoder_3": None, "tokenizer_3": None}),
        )


PIPELINES: dict[str, Callable[..., Any]] = {"sd": sd_pipeline, "sdxl": sdxl_pipeline, "sd3": sd3_pipeline}
POLICIES: dict[str, type[PipelinePolicy]] = {"sd": UNetPolicy, "sdxl": SDXLPolicy, "sd3": SD3Policy}


def tiny_pipeline(family: str, seed: int = 0, **options: Any) -> Any:
    """Make a tiny pipeline ("sd", "sdxl" or "sd3") whose random weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        pipeline = PIPELINES[family](**options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def tiny_policy(family: str, lora: LoraSettings | bool = False, seed: int = 0, **options: Any) -> PipelinePolicy:
    """Make a policy over a tiny pipeline.

    Args:
        family: "sd", "sdxl" or "sd3".
        lora: settings of a trainable adapter "default", or True for rank 4.
        seed: of all random weights.
        options: of the pipeline: ``prediction_type``, ``shift``, ``t5``.
    """
    policy = POLICIES[family](tiny_pipeline(family, seed, **options))
    if lora:
        policy.adapters.add("default", TINY_LORA if lora is True else lora, seed=seed)
    return policy


def tiny_sd(prediction_type: Prediction = "epsilon", lora: LoraSettings | bool = False, seed: int = 0) -> Policy:
    """Make a tiny Stable Diffusion policy: 8x8 latents of 4 channels."""
    return tiny_policy("sd", lora, seed, prediction_type=prediction_type)


def tiny_sdxl(prediction_type: Prediction = "epsilon", lora: LoraSettings | bool = False, seed: int = 0) -> Policy:
    """Make a tiny Stable Diffusion XL policy: 8x8 latents of 4 channels."""
    return tiny_policy("sdxl", lora, seed, prediction_type=prediction_type)


def tiny_sd3(lora: LoraSettings | bool = False, seed: int = 0, shift: float = 3.0) -> Policy:
    """Make a tiny Stable Diffusion 3 policy: 8x8 latents of 4 channels."""
    return tiny_policy("sd3", lora, seed, shift=shift)


def save_tiny(family: str, folder: Path, seed: int = 0, **options: Any) -> Path:
    """Write a tiny pipeline to a folder that ``load_policy`` and stock diffusers load."""
    tiny_pipeline(family, seed, **options).save_pretrained(folder)
    return folder


# --- a policy of two numbers --------------------------------------------------------------------------------------


class ToyLayer(nn.Module, BaseTunerLayer):
    """``q[0] * x + q[1] * mean(condition) * t / T`` with ``q = base + delta[active adapter]``."""

    adapter_layer_names = ("delta",)

    def __init__(self, weight: Sequence[float] | Tensor) -> None:
        super().__init__()
        values = weight if isinstance(weight, Tensor) else torch.tensor(weight, dtype=torch.float32)
        self.base = nn.Parameter(values, requires_grad=False)
        self.delta = nn.ParameterDict()
        self._active_adapter = []

    @property
    def q(self) -> Tensor:
        """The numbers under the present state of the adapters."""
        on = [] if self.disable_adapters else [name for name in self.active_adapters if name in self.delta]
        return self.base + sum(self.delta[name] for name in on) if on else self.base

    def forward(self, latents: Tensor, times: Tensor, text: Tensor) -> Tensor:
        q = self.q
        shape = (-1, *[1] * (latents.dim() - 1))
        return q[0] * latents + q[1] * (text.flatten(1).mean(dim=1) * times).reshape(shape)


class ToyBank(AdapterBank):
    """The real bank; only an adapter's birth differs: zeros to add instead of two factors."""

    def _check_targets(self, targets: Sequence[str]) -> None:
        """Nothing to choose: there is one layer."""

    def _inject(self, name: str, settings: LoraSettings) -> None:
        layer = self._module
        assert isinstance(layer, ToyLayer)
        layer.delta[name] = nn.Parameter(torch.zeros_like(layer.base))


class ToyPolicy(Policy):
    """Two numbers that predict: ``q0 * x + q1 * mean(text) * t / T``; see :class:`ToyLayer`.

    Captions are encoded to their length and last letter, images are their own latents. Adapters work as on real
    models: ``policy.adapters.add("default")`` gives a trainable delta of two zeros, so that policy equals reference at
    the start while gradients do not vanish.

    Args:
        process: "epsilon", "v_prediction", "sample" (discrete) or "flow", or a process.
        weight: the two frozen numbers.
        adapter: add the trainable adapter "default".
    """

    def __init__(
        self,
        process: str | NoiseProcess = "epsilon",
        weight: Sequence[float] = (0.7, 0.3),
        adapter: bool = True,
    ) -> None:
        super().__init__(ToyLayer(weight), toy_process(process) if isinstance(process, str) else process)
        self.adapters = ToyBank(self.module)
        if adapter:
            self.adapters.add("default")

    @property
    def lora_targets(self) -> Sequence[str]:
        return ()

    def with_module(
        self, module: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> ToyPolicy:
        other = super().with_module(module, device, dtype)
        other.adapters = ToyBank(module)
        return other

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        times = timesteps / self.process.num_train_timesteps
        output = self.module(latents, times.to(latents.dtype), condition.tensors["prompt_embeds"].to(latents.dtype))
        return self.adapters.guard(output)

    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        rows = [[len(prompt) / 10, (ord(prompt[-1]) % 7) / 7 if prompt else 0.0] for prompt in prompts]
        return Condition({"prompt_embeds": torch.tensor(rows, device=self.device)[:, None]})

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return pixels

    def decode(self, latents: Tensor) -> Tensor:
        return (latents[:, :3] / 2 + 0.5).clamp(0, 1)

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        return 3, height, width

    def with_size(self, condition: Condition, sizes: Mapping[str, Any]) -> Condition:
        return condition

    @property
    def default_resolution(self) -> tuple[int, int]:
        return 4, 4

    def offload_text_encoders(self) -> None:
        self.null_condition(1)

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        from diffalign.policies.saving import save_lora

        save_lora(folder, self.adapters, "default", "toy", metadata)


@cache
def toy_process(kind: str) -> NoiseProcess:
    """Make a process by the name of what is predicted."""
    if kind == "flow":
        return FlowProcess(shift=3.0)
    process = process_from_scheduler(ddim(kind))
    assert isinstance(process, DiscreteProcess)
    return process


class Ripples(Reward):
    """A smooth reward of images in the type they have: their mean, and waves over the pixels."""

    info = RewardInfo("ripples", "waves", (-math.inf, math.inf), differentiable=True)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        flat = images.flatten(1)
        waves = torch.linspace(0, 6, flat.shape[1], dtype=flat.dtype, device=flat.device).cos()
        return flat.mean(1) + 3 * (torch.sin(3 * flat) * waves).mean(1)


def image_batch(
    policy: Policy, examples: int = 2, images: int = 2, seed: int = 0, own_captions: bool = False, **fields: Tensor
) -> ImageBatch:
    """Make a batch of random latents with captions.

    Args:
        policy: gives shape and conditions.
        examples: B.
        images: N, latents an example.
        seed: of latents and of the examples' seeds.
        own_captions: each of the N images has its own caption; else all N share the condition object.
        fields: the batch's fields.
    """
    generator = torch.Generator().manual_seed(seed)
    shape = (images * examples, *policy.latent_shape(*policy.default_resolution))
    prompts = [f"a {chr(ord('a') + row % 26)}" for row in range(examples)]
    captions = [[f"{prompt}{image}" for prompt in prompts] for image in range(images)] if own_captions else [prompts]
    conditions = tuple(policy.encode_prompts(block) for block in captions)
    return ImageBatch(
        ids=[f"example-{row}" for row in range(examples)],
        seeds=torch.randint(2**40, (examples,), generator=generator),
        prompts=prompts,
        fields=fields,
        latents=torch.randn(shape, generator=generator),
        conditions=conditions if own_captions else conditions * images,
    )
