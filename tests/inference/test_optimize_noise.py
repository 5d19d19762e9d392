"""The Python interface of noise optimisation: stock pipelines, policies and names; nothing of them is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.testing import assert_close

import diffalign
from diffalign.errors import UserError
from diffalign.inference import one_step
from diffalign.inference.generate import generate
from diffalign.inference.noise_generators import PipelineGenerator, PolicyGenerator
from diffalign.inference.noise_result import to_picture
from diffalign.inference.one_step import ONE_STEP, OneStepModel, Sampling, get_one_step, known_model, load_one_step
from diffalign.policies.fingerprint import fingerprint
from diffalign.rewards.combine import WeightedSum
from tests.factories import Ripples, save_tiny, tiny_pipeline, tiny_policy

PROMPTS = ["a red cube", "two"]
FAMILIES = ["sd", "sdxl", "sd3"]
REWARDS = {"ripples": Ripples()}
every_family = pytest.mark.parametrize("family", FAMILIES)


def noise_of(shape: tuple[int, ...], rows: int = 2) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(3))


def state(parts: list[nn.Module]) -> tuple[str, list[bool], list[bool]]:
    named = [(f"{i}.{name}", p) for i, part in enumerate(parts) for name, p in part.named_parameters()]
    return fingerprint(named), [p.requires_grad for _, p in named], [p.grad is None for _, p in named]


@every_family
@pytest.mark.parametrize("steps", [1, 2])
def test_a_pipeline_makes_its_own_images(family: str, steps: int) -> None:
    pipeline = tiny_pipeline(family)
    generator = PipelineGenerator(pipeline, PROMPTS, Sampling(steps, 0.0), [1, 2])
    noise = noise_of(generator.noise_shape)
    with torch.no_grad():
        images = generator(noise, [0, 1])
    expected = pipeline(PROMPTS, latents=noise, num_inference_steps=steps, guidance_scale=0.0, output_type="pt").images
    assert_close(images, expected)
    leaf = noise.clone().requires_grad_()
    (slope,) = torch.autograd.grad(Ripples().score(generator(leaf, [0, 1]), PROMPTS).sum(), leaf)
    assert (slope.flatten(1).abs().amax(1) > 0).all()


@every_family
def test_a_policy_makes_the_images_of_its_pipeline(family: str) -> None:
    pipeline, policy = tiny_pipeline(family), tiny_policy(family)
    stock = PipelineGenerator(pipeline, PROMPTS, Sampling(2, 0.0), [0, 0])
    ours = PolicyGenerator(policy, PROMPTS, Sampling(2, 0.0))
    assert ours.noise_shape == stock.noise_shape
    noise = noise_of(ours.noise_shape)
    with torch.no_grad():
        assert_close(ours(noise, [1, 0]), stock(noise, [1, 0]), rtol=1e-3, atol=1e-3)


@every_family
def test_a_search_raises_the_reward_and_changes_nothing_else(family: str) -> None:
    pipeline = tiny_pipeline(family)
    parts = [part for part in pipeline.components.values() if isinstance(part, nn.Module)]
    before = state(parts)
    results = diffalign.optimize_noise(pipeline, PROMPTS, REWARDS, steps=6, checkpointing=True, vae_slicing=True)
    assert state(parts) == before
    assert not any(getattr(part, "is_gradient_checkpointing", False) for part in parts)
    assert not pipeline.vae.use_slicing
    for result in results:
        assert result.total >= result.history["total"][0]
        assert result.generations == 6
        assert isinstance(result.image, Image.Image)
    assert any(result.iteration > 0 for result in results)
    (plain,) = (diffalign.optimize_noise(pipeline, PROMPTS[0], REWARDS, steps=6),)
    assert plain.history["total"] == pytest.approx(results[0].history["total"], rel=1e-3, abs=1e-4)


@every_family
def test_the_start_is_the_models_plain_answer_to_the_seed(family: str) -> None:
    policy = tiny_policy(family)
    options: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 3.0, "seed": [5, 6]}
    results = diffalign.optimize_noise(policy, PROMPTS, REWARDS, steps=2, **options)
    expected = generate(policy, PROMPTS, [5, 6], num_steps=2, guidance_scale=3.0)
    for result, image in zip(results, expected, strict=True):
        difference = torch.tensor(list(result.first_image.getdata())) - torch.tensor(list(to_picture(image).getdata()))
        assert difference.abs().max() <= 1
    again = diffalign.optimize_noise(policy, PROMPTS, REWARDS, steps=2, **options)
    assert [result.history for result in again] == [result.history for result in results]
    baseline = diffalign.best_of_n(policy, PROMPTS, REWARDS, n=3, **options)
    for found, drawn in zip(results, baseline, strict=True):
        assert drawn.history["total"][0] == pytest.approx(found.history["total"][0], rel=1e-5)
        assert drawn.generations == 3
        assert drawn.total == max(drawn.history["total"])


def test_given_noise_and_timesteps() -> None:
    policy = tiny_policy("sd")
    noise = noise_of((4, 8, 8), 1)
    result = diffalign.optimize_noise(policy, "two", REWARDS, steps=1, noise=noise, timesteps=[800, 300])
    assert torch.equal(result.noise, noise[0])
    with pytest.raises(UserError, match="noise of shape"):
        diffalign.optimize_noise(policy, PROMPTS, REWARDS, noise=noise)


def test_models_and_rewards_by_name(tmp_path: Path) -> None:
    folder = save_tiny("sd", tmp_path / "sd")
    result = diffalign.optimize_noise(
        str(folder), "a cat", {"tiny-pickscore": 0.5, "mine": (Ripples(), 2.0)}, steps=2, device="cpu"
    )
    assert set(result.history) == {"tiny-pickscore", "mine", "total"}
    total = 0.5 * result.scores["tiny-pickscore"] + 2 * result.scores["mine"]
    assert result.total == pytest.approx(total, rel=1e-4)


def test_a_result_is_shown_and_saved(tmp_path: Path) -> None:
    result = diffalign.optimize_noise(tiny_policy("sd"), "a cat", REWARDS, steps=3)
    assert result._repr_png_()[:4] == b"\x89PNG"
    pytest.importorskip("matplotlib")
    assert len(result.plot().axes) == 3
    written = json.loads(result.save(tmp_path, "cat").read_text())
    assert written["generations"] == 3
    assert written["best"]["total"] == result.total
    assert torch.equal(load_file(tmp_path / "cat.safetensors")["noise"], result.noise)
    assert {path.name for path in tmp_path.iterdir()} == {"cat.json", "cat.png", "cat-first.png", "cat.safetensors"}


def test_what_is_known_of_one_step_models() -> None:
    assert {"sd-turbo", "sdxl-turbo", "pixart-dmd", "hyper-sdxl", "flux-schnell"} == set(ONE_STEP)
    assert get_one_step("hyper-sdxl").sampling.timesteps == (800,)
    assert get_one_step("hyper-sdxl").learning_rate == 10.0
    assert get_one_step("pixart-dmd").sampling.timesteps == (400,)
    assert all(model.sampling.num_steps == 1 for model in ONE_STEP.values())
    with pytest.raises(UserError, match="did you mean 'sd-turbo'"):
        get_one_step("sd-turob")


def test_a_one_step_model_is_loaded_with_its_own_scheduler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(save_tiny("sd", tmp_path / "sd"))
    model = OneStepModel(
        folder,
        "StableDiffusionPipeline",
        Sampling(1, 1.0, timesteps=(400,)),
        scheduler=("DDPMScheduler", {"clip_sample": False}),
        dtype=torch.float32,
        learning_rate=7.0,
    )
    monkeypatch.setitem(one_step.ONE_STEP, "tiny", model)
    pipeline = load_one_step("tiny")
    assert type(pipeline.scheduler).__name__ == "DDPMScheduler"
    assert known_model(pipeline) is model
    result = diffalign.optimize_noise("tiny", "two", REWARDS, steps=2, device="cpu")
    assert result.generations == 2


def test_mistakes_are_refused() -> None:
    policy = tiny_policy("sd")
    for options, message in (
        ({"stepz": 3}, "did you mean"),
        ({"seed": [1, 2, 3]}, "3 seeds were given for 2 captions"),
        ({"height": 16}, "height and width"),
        ({"timesteps": [1], "num_inference_steps": 2}, "1 timesteps were given for 2 steps"),
    ):
        with pytest.raises(UserError, match=message):
            diffalign.optimize_noise(policy, PROMPTS, REWARDS, **options)
    with pytest.raises(UserError, match="no rewards"):
        diffalign.optimize_noise(policy, PROMPTS, {})
    with pytest.raises(UserError, match="give a weight, a Reward, or a function"):
        diffalign.optimize_noise(policy, PROMPTS, {"mine": "red"})
    with pytest.raises(UserError, match="cannot make images with a WeightedSum"):
        diffalign.optimize_noise(WeightedSum(REWARDS, {"ripples": 1.0}), PROMPTS, REWARDS)
    with pytest.raises(UserError, match="no captions"):
        diffalign.optimize_noise(policy, [], REWARDS)
