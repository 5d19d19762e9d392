"""Deterministic inversion: from clean latents back to the noisy latents that the sampler would have come from.

An inversion climbs a *ladder*, an explicit list of moves (label, level from, level to), so that no scheduler's indexing
decides anything; ``ladders`` builds them. A move needs the prediction at its destination, which is unknown: naive
inversion predicts at the source (Song et al., arXiv 2010.02502), and fixed-point refinement (ReNoise, arXiv 2403.14602)
predicts again at each new estimate, always moving from the same source.

Everything here runs without gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffalign.diffusion.base import NoiseProcess
from diffalign.diffusion.guidance import Predictor
from diffalign.diffusion.ladders import Label, Rung, exact_ladder, official_ladder, sampling_ladder
from diffalign.diffusion.level import Level
from diffalign.diffusion.sampling import follow
from diffalign.diffusion.sde import StepNoise, ddim_std
from diffalign.errors import UserError, unknown

LevelMatching = Literal["exact", "official"]
PredictRows = Callable[[Tensor], Predictor]
"""(indices of rows) -> the predictor for the latents of those rows."""


@dataclass(frozen=True)
class FixedPoint:
    """How often a move is refined.

    Args:
        passes: predictions after the first one; 0 is naive inversion.
        average: half-open range of passes (the first prediction is pass 0) whose mean is taken; None, or a range that
            no pass falls into, keeps the last one. A mean of estimates is the move with the mean prediction.
    """

    passes: int = 0
    average: tuple[int, int] | None = None

    def shares(self, length: int) -> Tensor:
        """Return the share of each pass, (length,)."""
        counted = [i for i in range(*self.average) if i <= self.passes] if self.average else []
        shares = torch.zeros(max(length, self.passes + 1), dtype=torch.float64)
        shares[counted or [self.passes]] = 1.0
        return (shares / shares.sum())[:length]


@dataclass(frozen=True)
class Refinement:
    """Refinement along a path (official ReNoise code: gentler at the first levels, where latents hardly change).

    Args:
        usual: for most moves.
        early: for moves whose label lies below ``early_below``; None for no exception.
        early_below: a timestep; 250 in the official code.
    """

    usual: FixedPoint = FixedPoint()
    early: FixedPoint | None = None
    early_below: float = 250.0

    def shares(self, labels: Tensor) -> Tensor:
        """Return what share each pass has in a row's move, (passes + 1, rows), columns summing to 1.

        Args:
            labels: (rows,) of one move, on the CPU.
        """
        early = labels < self.early_below if self.early else torch.zeros_like(labels, dtype=torch.bool)
        settings = [self.usual] * (not bool(early.all())) + [self.early or self.usual] * bool(early.any())
        length = 1 + max(setting.passes for setting in settings)
        usual, at_first = self.usual.shares(length), (self.early or self.usual).shares(length)
        return torch.where(early, at_first[:, None], usual[:, None])


@dataclass(frozen=True)
class InversionPath:
    """A path from clean latents upwards, of n moves.

    Args:
        latents: n + 1 tensors (rows, channels, ...): before the first move, then after each.
        timesteps: (n,) the labels that the network was given.
        predictions: n tensors (rows, channels, ...): what the network said of ``latents[k]`` under ``timesteps[k]``.
        sources, destinations: (n,) levels of the moves.
    """

    latents: Sequence[Tensor]
    timesteps: Tensor
    predictions: Sequence[Tensor]
    sources: Level
    destinations: Level


def climb(
    predict: Predictor,
    process: NoiseProcess,
    latents: Tensor,
    rung: Rung,
    refinement: Refinement | None = None,
    clip: bool = False,
) -> tuple[Tensor, Tensor]:
    """Make one move up, of all rows.

    Args:
        predict: (latents, timesteps) -> prediction.
        process: the noise process.
        latents: (rows, channels, ...) at the rung's source.
        rung: the move.
        refinement: naive by default.
        clip: bound predicted images in a first prediction's move by the process's ``clip_range``, as diffusers' inverse
            scheduler does; for pixels, never for latents.

    Returns:
        latents at the rung's destination, and the first prediction, both (rows, channels, ...).
    """
    labels = rung.labels.to(latents.device)
    first = predict(latents, labels)
    estimate = process.move(first, latents, rung.source, rung.destination, clip)
    shares = (refinement or Refinement()).shares(rung.labels)
    if len(shares) == 1:
        return estimate, first
    total = _rows(shares[0], estimate) * estimate
    for share in shares[1:]:
        prediction = predict(estimate, labels)
        estimate = process.backtrack(prediction, estimate, rung.destination, latents, rung.source)
        total = total + _rows(share, estimate) * estimate
    return total, first


@torch.no_grad()
def invert_to(
    predict: Predictor,
    process: NoiseProcess,
    latents: Tensor,
    timesteps: Tensor,
    num_steps: int,
    *,
    level_matching: LevelMatching = "exact",
    refinement: Refinement | None = None,
    eta: float = 0.0,
    generator: torch.Generator | None = None,
    step_noise: StepNoise | None = None,
    predict_rows: PredictRows | None = None,
) -> Tensor:
    """Invert clean latents up to a timestep of each row's own.

    Args:
        predict: (latents, timesteps) -> prediction, guidance included.
        process: the noise process.
        latents: (rows, channels, ...) clean latents.
        timesteps: (rows,) where each row stops.
        num_steps: moves that the whole way up would take; a row makes its share.
        level_matching: "exact" ends at the level of ``timesteps``; "official" at the next level of a fixed grid, as the
            published code of InPO and SmPO does (discrete processes only).
        refinement: fixed-point refinement; naive by default.
        eta: share of the sampler's randomness added after each move (InPO: 0.1).
        generator: draws that randomness.
        step_noise: gives that randomness instead, where it must not depend on the batch.
        predict_rows: the same network for some rows; rows that have arrived are then no longer evaluated.

    Returns:
        (rows, channels, ...) noisy latents, float32 or float64, no graph.

    Raises:
        UserError: for ``eta > 0`` without a source of randomness, or official matching on flow.
    """
    if eta > 0 and (generator is None) == (step_noise is None):
        raise UserError(f"inversion with eta {eta} needs randomness: give either a generator or step_noise")
    if level_matching not in get_args(LevelMatching):
        raise unknown("level matching", level_matching, get_args(LevelMatching))
    build = exact_ladder if level_matching == "exact" else official_ladder
    for index, rung in enumerate(build(process, timesteps, num_steps)):
        rows = rung.active.nonzero()[:, 0]
        if predict_rows is None or len(rows) == len(latents):
            climbed, _ = climb(predict, process, latents, rung, refinement)
        else:
            here = rows.to(latents.device)
            part, _ = climb(predict_rows(here), process, latents[here], rung.select(rows), refinement)
            climbed = latents.to(part).index_copy(0, here, part)
        if eta > 0:
            noise = step_noise(index) if step_noise else _draw(latents, generator)
            std = ddim_std(rung.destination, rung.source, eta)
            climbed = climbed + _rows(std, climbed) * noise.to(climbed)
        latents = torch.where(_rows(rung.active, climbed), climbed, latents.to(climbed))
    return latents


@torch.no_grad()
def invert_path(
    predict: Predictor,
    process: NoiseProcess,
    latents: Tensor,
    num_steps: int,
    *,
    label: Label = "destination",
    refinement: Refinement | None = None,
    clip: bool = False,
) -> InversionPath:
    """Invert clean latents along the sampler's whole grid and keep the path.

    Args:
        predict: (latents, timesteps) -> prediction, guidance included.
        process: the noise process.
        latents: (rows, channels, ...) clean latents.
        num_steps: moves.
        label: which timestep the network is told.
        refinement: fixed-point refinement; naive by default.
        clip: as of :func:`climb`.
    """
    ladder = sampling_ladder(process, len(latents), num_steps, label)
    return climb_path(predict, process, latents, ladder, refinement, clip)


@torch.no_grad()
def climb_path(
    predict: Predictor,
    process: NoiseProcess,
    latents: Tensor,
    ladder: Sequence[Rung],
    refinement: Refinement | None = None,
    clip: bool = False,
) -> InversionPath:
    """Climb a ladder whose moves all rows share, and keep the path; arguments as of :func:`invert_path`."""
    visited, predictions = [latents], []
    for rung in ladder:
        latents, prediction = climb(predict, process, latents, rung, refinement, clip)
        visited.append(latents)
        predictions.append(prediction)
    return InversionPath(
        visited,
        torch.stack([rung.labels[0] for rung in ladder]),
        predictions,
        Level.cat([rung.source.select(slice(0, 1)) for rung in ladder]),
        Level.cat([rung.destination.select(slice(0, 1)) for rung in ladder]),
    )


@torch.no_grad()
def round_trip_error(
    predict: Predictor,
    process: NoiseProcess,
    latents: Tensor,
    num_steps: int,
    *,
    label: Label = "destination",
    refinement: Refinement | None = None,
) -> Tensor:
    """Return the largest absolute difference between latents and their inversion sampled back, (rows,).

    Arguments as of :func:`invert_path`. Naive inversion errs by about ``1 / num_steps``, a converged fixed point not at
    all.
    """
    path = invert_path(predict, process, latents, num_steps, label=label, refinement=refinement)
    back = follow(predict, process, path.latents[-1], process.sampling_grid(num_steps))
    return (back - latents).abs().flatten(1).amax(1)


def _rows(values: Tensor, like: Tensor) -> Tensor:
    """Shape one value a row (rows,) to broadcast over ``like`` (rows, channels, ...), on its device."""
    values = values.to(like.device) if values.dtype == torch.bool else values.to(like)
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _draw(latents: Tensor, generator: torch.Generator | None) -> Tensor:
    """Standard normal noise shaped as ``latents``, drawn on the generator's device."""
    assert generator is not None
    return torch.randn(latents.shape, generator=generator, device=generator.device)
