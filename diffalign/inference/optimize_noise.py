"""Better images at inference, without training: optimise the noise that a one- or few-step model starts from (ReNO).

:func:`optimize_noise` follows the gradient of rewards, :func:`best_of_n` draws as many images and keeps the best: the
baseline of the same number of generations. Both take policies, names of models, and pipelines of diffusers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, overload

import torch
from torch import Tensor

from diffalign.device import choose_device
from diffalign.diffusion.random import derive_seed
from diffalign.errors import UserError, unknown
from diffalign.inference.noise_generators import NoiseGenerator, PipelineGenerator, PolicyGenerator
from diffalign.inference.noise_judge import Judge, best_of_noises
from diffalign.inference.noise_result import NoiseResult
from diffalign.inference.noise_search import Callback, NoiseSearch, SearchSettings
from diffalign.inference.one_step import ONE_STEP, Sampling, known_model, load_one_step
from diffalign.policies.components import PipelinePolicy
from diffalign.rewards.base import Metadata
from diffalign.rewards.given import Rewards, weighted


@dataclass(frozen=True)
class NoiseOptions:
    """How images are made and noise is drawn; shared by search and baseline.

    Args:
        num_inference_steps: denoising steps; None for those the model is known for, else 1.
        guidance_scale: as pipelines take it; None for what the model is known for, else 0 (none).
        timesteps: timesteps instead of the scheduler's own.
        height, width: in pixels; None for the model's own.
        seed: of the start: one number for all captions, or one each.
        dtype: type of the weights of a model given by name.
        device: where a model given by name goes.
        checkpointing: compute activations of the model again in backward: less memory, more time.
        vae_slicing: decode images one at a time.
    """

    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    timesteps: Sequence[int] | None = None
    height: int | None = None
    width: int | None = None
    seed: int | Sequence[int] = 0
    dtype: torch.dtype | None = None
    device: torch.device | str | None = None
    checkpointing: bool = False
    vae_slicing: bool = False

    def sampling(self, known: Sampling) -> Sampling:
        """Return how images are made, for a model that is known to be sampled in some way.

        Raises:
            UserError: for a height without a width.
        """
        if (self.height is None) != (self.width is None):
            raise UserError("give height and width together")
        size = (self.height, self.width) if self.height is not None and self.width is not None else known.resolution
        timesteps = known.timesteps if self.num_inference_steps is None else ()
        timesteps = tuple(self.timesteps) if self.timesteps is not None else timesteps
        steps = self.num_inference_steps or (len(timesteps) or known.num_steps)
        guidance = known.guidance_scale if self.guidance_scale is None else self.guidance_scale
        return Sampling(steps, guidance, timesteps, size)

    def seeds(self, count: int) -> list[int]:
        """Return one seed a caption.

        Raises:
            UserError: for another number of seeds than captions.
        """
        if isinstance(self.seed, int):
            return [self.seed] * count
        if len(self.seed) != count:
            raise UserError(f"{len(self.seed)} seeds were given for {count} captions")
        return [int(seed) for seed in self.seed]


@overload
def optimize_noise(
    pipeline: Any, prompt: str, rewards: Rewards, *, steps: int = ..., **options: Any
) -> NoiseResult: ...
@overload
def optimize_noise(
    pipeline: Any, prompt: Sequence[str], rewards: Rewards, *, steps: int = ..., **options: Any
) -> list[NoiseResult]: ...
def optimize_noise(
    pipeline: Any,
    prompt: str | Sequence[str],
    rewards: Rewards,
    *,
    steps: int = 50,
    noise: Tensor | None = None,
    metadata: Metadata | None = None,
    callback: Callback | None = None,
    **options: Any,
) -> NoiseResult | list[NoiseResult]:
    """Optimise the initial noise of each caption for rewards, all weights frozen.

    Example::

        result = diffalign.optimize_noise("tiny-sd", "a red circle", {"tiny-pickscore": 1.0}, num_inference_steps=2)
        result.image, result.history["total"], result.plot()

    Args:
        pipeline: a pipeline of diffusers, a policy, a model that ``load_policy`` takes, or a one-step model by name
            (:data:`diffalign.inference.one_step.ONE_STEP`).
        prompt: one caption, or several, which are searched side by side.
        rewards: ``"pickscore:0.05,clip:0.01"``, a reward, or name -> weight, reward, or (reward, weight); functions of
            (images, prompts) with a gradient are wrapped in ``FunctionReward(..., differentiable=True)``.
        steps: iterations, each one generation.
        noise: (captions, channels, ...) to start from, instead of noise drawn from ``seed``.
        metadata: structured description of each caption, for rewards that need it.
        callback: told of every iteration; a true answer ends the search.
        **options: fields of :class:`NoiseOptions` and :class:`SearchSettings`.

    Returns:
        for each caption the best image seen, the start included, with its noise and the history of every reward; a
        single one for a single caption.

    Raises:
        UserError: for unknown options, models and rewards, a reward without gradient, or one that is not finite.
    """
    how, settings = _split(options)
    known_rate = _known_rate(pipeline)
    if known_rate is not None and "learning_rate" not in options:
        settings = replace(settings, learning_rate=known_rate)
    settings = replace(settings, steps=steps)
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    seeds = how.seeds(len(prompts))
    with _prepared(pipeline, prompts, seeds, how) as generator:
        search = NoiseSearch(generator, weighted(rewards, generator.device), settings)
        start = generator.draw(seeds) if noise is None else _checked(noise, generator, len(prompts))
        found = search(start.to(generator.device), prompts, metadata, callback)
    results = [NoiseResult.of(*row) for row in zip(found, prompts, seeds, strict=True)]
    return results[0] if isinstance(prompt, str) else results


@overload
def best_of_n(pipeline: Any, prompt: str, rewards: Rewards, *, n: int = ..., **options: Any) -> NoiseResult: ...
@overload
def best_of_n(
    pipeline: Any, prompt: Sequence[str], rewards: Rewards, *, n: int = ..., **options: Any
) -> list[NoiseResult]: ...
def best_of_n(
    pipeline: Any,
    prompt: str | Sequence[str],
    rewards: Rewards,
    *,
    n: int = 50,
    metadata: Metadata | None = None,
    max_rows: int = 0,
    **options: Any,
) -> NoiseResult | list[NoiseResult]:
    """Draw ``n`` images of each caption and keep the best: what a search of ``n`` iterations must beat.

    Args:
        pipeline, prompt, rewards, metadata: as of :func:`optimize_noise`; rewards need no gradient.
        n: images of each caption; the first is the start of the search.
        max_rows: captions in one pass; 0 for all.
        **options: fields of :class:`NoiseOptions`.

    Returns:
        as :func:`optimize_noise`; the history holds one image a draw.

    Raises:
        UserError: for unknown options, models and rewards, or a reward that is not finite.
    """
    if n < 1:
        raise UserError(f"n is {n}: expected 1 at least")
    how = NoiseOptions(**_only(options, NoiseOptions))
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    seeds = how.seeds(len(prompts))
    with _prepared(pipeline, prompts, seeds, how) as generator:

        def drawn(draw: int) -> Tensor:
            return generator.draw([derive_seed(seed, "candidate", draw) if draw else seed for seed in seeds])

        judge = Judge(generator, weighted(rewards, generator.device), prompts, metadata)
        found = best_of_noises(judge, drawn, n, max_rows)
    results = [NoiseResult.of(*row) for row in zip(found, prompts, seeds, strict=True)]
    return results[0] if isinstance(prompt, str) else results


def load_model(name: str | Path, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Any:
    """Load what images are made with, once for many calls.

    Args:
        name: a one-step model by name, or whatever ``load_policy`` takes.
        dtype: type of the weights; by default that of the one-step model, else float32.
        device: where it goes; by default an accelerator where there is one.

    Raises:
        UserError: if there is no such model.
    """
    from diffalign.policies.loading import load_policy

    device = device or choose_device()
    if str(name) in ONE_STEP:
        return load_one_step(str(name), device, dtype)
    return load_policy(name, dtype=dtype or torch.float32, device=device)


@contextmanager
def _prepared(
    pipeline: Any, prompts: Sequence[str], seeds: Sequence[int], how: NoiseOptions
) -> Iterator[NoiseGenerator]:
    if not prompts:
        raise UserError("no captions were given")
    if isinstance(pipeline, (str, Path)):
        pipeline = load_model(pipeline, how.dtype, how.device)
    known = known_model(pipeline)
    sampling = how.sampling(known.sampling if known else Sampling())
    generator: NoiseGenerator
    if isinstance(pipeline, PipelinePolicy):
        generator = PolicyGenerator(pipeline, prompts, sampling)
    elif callable(pipeline) and hasattr(pipeline, "components"):
        generator = PipelineGenerator(pipeline, prompts, sampling, seeds)
    else:
        raise UserError(f"cannot make images with a {type(pipeline).__name__}: give a pipeline, a policy, or a name")
    with generator.frozen(how.checkpointing, how.vae_slicing):
        yield generator


def _known_rate(pipeline: Any) -> float | None:
    model = ONE_STEP.get(pipeline) if isinstance(pipeline, str) else known_model(pipeline)
    return model.learning_rate if model else None


def _checked(noise: Tensor, generator: NoiseGenerator, count: int) -> Tensor:
    expected = (count, *generator.noise_shape)
    if tuple(noise.shape) != expected:
        raise UserError(f"noise of shape {tuple(noise.shape)} was given where {expected} is expected")
    return noise


def _split(options: Mapping[str, Any]) -> tuple[NoiseOptions, SearchSettings]:
    """Share options out."""
    how, search = ({f.name for f in fields(group)} for group in (NoiseOptions, SearchSettings))
    for name in options:
        if name not in how | search:
            raise unknown("option", name, how | search)
    return (
        NoiseOptions(**{name: value for name, value in options.items() if name in how}),
        SearchSettings(**{name: value for name, value in options.items() if name in search}),
    )


def _only(options: Mapping[str, Any], group: type) -> dict[str, Any]:
    known = [f.name for f in fields(group)]
    for name in options:
        if name not in known:
            raise unknown("option", name, known)
    return dict(options)
