"""How far policy and reference part along a whole path from image to noise: the kernel of Inversion-DPO.

The path is deterministic inversion with N guided moves and levels ``l_-1`` (clean) < ``l_0`` < ... < ``l_N-1``. At each
of its latents z_k, before move k, both networks get the label of ``l_k``, and their estimates are compared::

    D_k = mean over the elements of (policy_k - reference_k)^2        one number for each image and move
    w_k = 1 / (2 alpha_k^2)                                           alpha of level l_k

Estimates are of the noise, converted at the level that z_k lies on, ``l_k-1``. Flow models are compared in velocity,
with w_k = 1. Paths are constants; only the policy's side of D carries a graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffalign.batch import Condition, ImageBatch
from diffalign.diffusion.base import NoiseProcess
from diffalign.diffusion.guidance import Predictor, guided
from diffalign.diffusion.inversion import climb_path
from diffalign.diffusion.ladders import Rung, sampling_ladder
from diffalign.diffusion.level import Level
from diffalign.errors import UserError
from diffalign.policies.base import Policy
from diffalign.strategies.base import Context, Piece
from diffalign.strategies.pair_kernel import squared_errors

PathOwner = Literal["reference", "policy"]


@dataclass(frozen=True)
class PathDraws:
    """Every move of every image is a row: the images of the first move in block order, those of the second, and so on.

    Args:
        latents: (N * images, channels, ...) before each move.
        timesteps: (N * images,) labels.
        levels: (N * images,) that the latents lie on.
        reference: (N * images, channels, ...) the reference's estimates there.
        weights: (N * images,) w_k.
        condition: (images) their captions.
    """

    latents: Tensor
    timesteps: Tensor
    levels: Level
    reference: Tensor
    weights: Tensor
    condition: Condition


@dataclass(frozen=True)
class PathKernel:
    """Terms are the D_k, (N * images, 1); the frozen values "path_weight" are the w_k.

    Args:
        num_steps: N.
        guidance_scale: of both networks, in the inversion and in the comparison; 1 for none.
        owner: whose predictions lead the path.
    """

    num_steps: int
    guidance_scale: float
    owner: PathOwner

    def draw(self, ctx: Context, batch: ImageBatch) -> PathDraws:
        """Invert the images, and ask the reference along the way."""
        assert ctx.reference is not None
        process, images = ctx.policy.process, len(batch.latents)
        ladder = sampling_ladder(process, images, self.num_steps)
        timesteps = torch.cat([rung.labels for rung in ladder]).to(batch.latents.device)
        if self.owner == "reference":
            with ctx.reference.active() as reference:
                latents, predictions = self._path(reference, batch, ladder)
        else:
            latents, _ = self._path(ctx.policy, batch, ladder)
            with ctx.reference.active() as reference:
                predictions = self._along(reference, latents, timesteps, batch)
        levels = Level.cat([rung.source for rung in ladder])
        return PathDraws(
            latents=latents,
            timesteps=timesteps,
            levels=levels,
            reference=_estimate(process, predictions, latents, levels),
            weights=_weights(process, Level.cat([rung.destination for rung in ladder])).to(latents),
            condition=batch.condition,
        )

    def rows(self, draws: PathDraws) -> int:
        """Number of moves of all images."""
        return len(draws.latents)

    def frozen(self, ctx: Context, batch: ImageBatch, draws: PathDraws, piece: Piece) -> Mapping[str, Tensor]:
        """Weights of the rows of a piece, ``{"path_weight": (rows, 1)}``; the reference was asked in :meth:`draw`."""
        return {"path_weight": draws.weights[piece.rows or slice(None)][:, None]}

    def terms(self, ctx: Context, batch: ImageBatch, draws: PathDraws, piece: Piece) -> Tensor:
        """D of the rows of a piece, (rows, 1)."""
        rows = piece.rows or slice(None)
        latents, levels = draws.latents[rows], draws.levels.select(rows)
        image = torch.arange(self.rows(draws), device=latents.device)[rows] % len(draws.condition)
        predict = self._guided(ctx.policy, draws.condition.select(image))
        estimate = _estimate(ctx.policy.process, predict(latents, draws.timesteps[rows]), latents, levels)
        return squared_errors(estimate, draws.reference[rows])[:, None]

    def _path(self, policy: Policy, batch: ImageBatch, ladder: Sequence[Rung]) -> Tensor:
        """Latents before each move and predictions there, (2, N * images, channels, ...)."""
        with policy.inference():
            path = climb_path(self._guided(policy, batch.condition), policy.process, batch.latents, ladder)
        return torch.stack([torch.cat(list(path.latents[:-1])), torch.cat(list(path.predictions))])

    def _along(self, policy: Policy, latents: Tensor, timesteps: Tensor, batch: ImageBatch) -> Tensor:
        """Predictions at given latents, (N * images, channels, ...), one move at a time."""
        predict, images = self._guided(policy, batch.condition), len(batch.latents)
        with policy.inference():
            moves = zip(latents.split(images), timesteps.split(images), strict=True)
            return torch.cat([predict(before, label) for before, label in moves])

    def _guided(self, policy: Policy, condition: Condition) -> Predictor:
        null = None if self.guidance_scale == 1.0 else policy.null_condition(len(condition))
        return guided(policy.predict, condition, null, self.guidance_scale)


def _estimate(process: NoiseProcess, prediction: Tensor, noisy: Tensor, level: Level) -> Tensor:
    """What is compared: the noise, or the velocity of a flow model."""
    return prediction if process.prediction_type == "flow" else process.to_epsilon(prediction, noisy, level)


def _weights(process: NoiseProcess, level: Level) -> Tensor:
    """w_k of levels (rows,).

    Raises:
        UserError: if the path ends at a level that holds no image, where the weight would be infinite.
    """
    if process.prediction_type == "flow":
        return torch.ones_like(level.alpha)
    if not bool((level.alpha > 0).all()):
        raise UserError(
            "the path reaches a level without any image (zero terminal SNR), whose weight is infinite: set "
            "timestep_spacing to 'leading' in the model's scheduler config"
        )
    return 0.5 / level.alpha.square()
