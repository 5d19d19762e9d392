"""From a batch of images to denoising errors: the mathematics that all denoising objectives share.

A *noiser* says which (noisy latents, timesteps, target) an example is trained on; the kernel evaluates the policy and
the reference there and reduces squared errors to one float32 number a row (or a row of numbers, for frames).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from diffalign.batch import Condition, ImageBatch
from diffalign.diffusion.random import randn_rows, row_generators
from diffalign.diffusion.timesteps import draw_indices, few_step_timesteps
from diffalign.errors import UserError
from diffalign.policies.base import Policy
from diffalign.strategies.base import Context, Piece


@dataclass(frozen=True)
class Noised:
    """Where the denoiser is evaluated, in block order.

    Args:
        latents: (rows, channels, ...) noisy latents.
        timesteps: (rows,) model-facing timesteps.
        target: (rows, channels, ...) what the prediction is compared with.
        condition: one row each.
        weights: optional non-negative weights of the squared error, broadcastable to ``target`` (masks, heat maps).
    """

    latents: Tensor
    timesteps: Tensor
    target: Tensor
    condition: Condition
    weights: Tensor | None = None

    def select(self, rows: slice | None) -> Noised:
        """Return some rows; all of them for None."""
        if rows is None:
            return self
        weights = None if self.weights is None else self.weights.expand_as(self.target)[rows]
        return Noised(self.latents[rows], self.timesteps[rows], self.target[rows], self.condition.select(rows), weights)


Noiser = Callable[[Context, ImageBatch], Noised]


@dataclass(frozen=True)
class TimestepOptions:
    """Which timesteps a method trains that draws them afresh.

    Args:
        timestep_floor: share of the least noisy timesteps that is left out: there the image says what it shows, and the
            caption moves the prediction little. 0: the papers.
    """

    timestep_floor: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.timestep_floor < 1:
            raise UserError(f"timestep_floor is {self.timestep_floor}: expected a share, 0 or more and below 1")


def draw_timesteps(ctx: Context, batch: ImageBatch, floor: float = 0.0) -> Tensor:
    """Draw one timestep an example from the process's own training distribution, (B,).

    Args:
        ctx: gives the process.
        batch: gives the seeds.
        floor: share of the training timesteps, from the least noisy on, that is left out.
    """
    process = ctx.policy.process
    low = int(floor * process.num_train_timesteps)
    drawn = [process.sample_timesteps(1, generator, low=low) for generator in row_generators(batch.seeds, "timestep")]
    return torch.cat(drawn).to(ctx.device)


def draw_few_step_timesteps(ctx: Context, batch: ImageBatch, num_steps: int) -> Tensor:
    """Draw one timestep an example, uniformly from the few that a distilled model knows, (B,).

    Args:
        ctx: gives the process.
        batch: gives the seeds.
        num_steps: how many timesteps the model knows, evenly spread.
    """
    process = ctx.policy.process
    total = process.num_train_timesteps
    drawn = torch.cat([draw_indices(1, generator, 0, total) for generator in row_generators(batch.seeds, "timestep")])
    return process.timestep_at(few_step_timesteps(drawn, total, num_steps)).to(ctx.device)


def noised_at(ctx: Context, batch: ImageBatch, timesteps: Tensor, noise: Tensor) -> Noised:
    """Noise every image with the process's own target.

    Args:
        ctx: gives the process.
        batch: B examples of N images.
        timesteps: (B,) one an example, shared by its images.
        noise: (N * B, channels, ...) in block order.
    """
    process, timesteps = ctx.policy.process, timesteps.repeat(batch.images_per_example)
    return Noised(
        latents=process.add_noise(batch.latents, noise, timesteps),
        timesteps=timesteps,
        target=process.target(batch.latents, noise, timesteps),
        condition=batch.condition,
    )


def shared_noise(ctx: Context, batch: ImageBatch) -> Tensor:
    """Draw one noise an example, the same for all its images, (N * B, channels, ...)."""
    noise = randn_rows(batch.seeds, batch.latents.shape[1:], "noise", ctx.device)
    return noise.repeat(batch.images_per_example, *[1] * (noise.dim() - 1))


def fresh_noise(ctx: Context, batch: ImageBatch, floor: float = 0.0) -> Noised:
    """Draw ONE timestep and ONE noise an example and use them for all its images (as Diffusion-DPO's code does)."""
    return noised_at(ctx, batch, draw_timesteps(ctx, batch, floor), shared_noise(ctx, batch))


def own_noise(ctx: Context, batch: ImageBatch, floor: float = 0.0) -> Noised:
    """Draw ONE timestep an example, and for each of its images a noise of its own."""
    shape = (batch.images_per_example, *batch.latents.shape[1:])
    noise = randn_rows(batch.seeds, shape, "noise", ctx.device).transpose(0, 1).flatten(0, 1)
    return noised_at(ctx, batch, draw_timesteps(ctx, batch, floor), noise)


def squared_errors(
    prediction: Tensor, target: Tensor, weights: Tensor | None = None, keep_dims: tuple[int, ...] = ()
) -> Tensor:
    """Mean squared error of each row, at least in float32.

    Args:
        prediction, target: (rows, channels, ...).
        weights: weights of the squared differences, broadcastable to ``target``.
        keep_dims: dimensions besides the first that are not averaged over (frames of a video).

    Returns:
        (rows,) or (rows, kept...).
    """
    dtype = torch.promote_types(prediction.dtype, torch.float32)
    error = (prediction.to(dtype) - target.to(dtype)).square()
    if weights is not None:
        error = error * weights.to(dtype)
    reduced = [d for d in range(1, error.dim()) if d not in keep_dims]
    return error.mean(dim=reduced)


@dataclass(frozen=True)
class DenoisingKernel:
    """Evaluates policy and reference where a noiser says; terms are errors of shape (rows, K).

    Args:
        noiser: chooses noisy latents, timesteps and target.
        frame_dim: dimension of ``latents`` whose entries stay apart as K (2 for video); None for one error a row.
    """

    noiser: Noiser = fresh_noise
    frame_dim: int | None = None

    @classmethod
    def drawing(cls, options: TimestepOptions, noiser: Callable[..., Noised] = fresh_noise) -> DenoisingKernel:
        """Evaluate at timesteps that are drawn afresh as a method's options say."""
        return cls(partial(noiser, floor=options.timestep_floor))

    def draw(self, ctx: Context, batch: ImageBatch) -> Noised:
        """Call the noiser."""
        return self.noiser(ctx, batch)

    def rows(self, draws: Noised) -> int:
        """Number of rows drawn."""
        return len(draws.latents)

    def terms(self, ctx: Context, batch: ImageBatch, draws: Noised, piece: Piece) -> Tensor:
        """Errors of the policy, (rows, K)."""
        return self._errors(ctx.policy, draws.select(piece.rows))

    def frozen(self, ctx: Context, batch: ImageBatch, draws: Noised, piece: Piece) -> Mapping[str, Tensor]:
        """Errors of the reference, ``{"reference": (rows, K)}``."""
        assert ctx.reference is not None
        noised = draws.select(piece.rows)
        keys = None
        if batch.cache_keys is not None:
            keys = [f"{key}/{image}" for image in range(batch.images_per_example) for key in batch.cache_keys]
            keys = keys if piece.rows is None else keys[piece.rows]
        return {"reference": ctx.reference.evaluate(lambda policy: self._errors(policy, noised), keys)}

    def _errors(self, policy: Policy, noised: Noised) -> Tensor:
        prediction = policy.predict(noised.latents, noised.timesteps, noised.condition)
        keep = () if self.frame_dim is None else (self.frame_dim,)
        errors = squared_errors(prediction, noised.target, noised.weights, keep)
        return errors if errors.dim() == 2 else errors[:, None]
