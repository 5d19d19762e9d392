"""The moves of an inversion, spelled out: which label, from which level, to which level, for which rows."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from diffalign.diffusion.base import NoiseProcess, check_steps
from diffalign.diffusion.discrete import DiscreteProcess
from diffalign.diffusion.flow import FlowProcess
from diffalign.diffusion.level import Level
from diffalign.errors import UserError, unknown

Label = Literal["destination", "source"]
"""The timestep that the network is told on a move up: that of the level it leads to, as the sampler says on the way
back, or that of the level it starts from."""


class Rung(NamedTuple):
    """One move up, of every row; kept on the CPU.

    Args:
        labels: (rows,) timesteps given to the network.
        source, destination: (rows,) levels.
        active: (rows,) bool, False for rows that have already arrived.
    """

    labels: Tensor
    source: Level
    destination: Level
    active: Tensor

    def select(self, rows: Tensor) -> Rung:
        """Return the given rows."""
        return Rung(self.labels[rows], self.source.select(rows), self.destination.select(rows), self.active[rows])


def sampling_ladder(process: NoiseProcess, rows: int, num_steps: int, label: Label = "destination") -> list[Rung]:
    """Return the sampler's own moves, backwards: what inverts a sampled image."""
    if label not in get_args(Label):
        raise unknown("label", label, get_args(Label))
    grid = process.sampling_grid(num_steps)
    timesteps, starts = grid.timesteps.flip(0), _flip(grid.destinations)
    labels = timesteps if label == "destination" else _source_labels(process, timesteps, starts, num_steps)
    return _shared_rungs(labels, _startable(process, starts), _flip(grid.sources), rows)


def exact_ladder(process: NoiseProcess, timesteps: Tensor, num_steps: int, label: Label = "destination") -> list[Rung]:
    """Return equal moves from clean latents up to exactly each row's timestep.

    A row makes ``max(1, ceil(num_steps * t / T))`` moves.

    Args:
        process: the noise process.
        timesteps: (rows,) where each row stops.
        num_steps: moves that the whole way up would take.
        label: what the network is told.
    """
    check_steps(num_steps, process.num_train_timesteps)
    if label not in get_args(Label):
        raise unknown("label", label, get_args(Label))
    stops = timesteps.cpu()
    counts = (stops.double() * num_steps / process.num_train_timesteps).ceil().clamp(min=1)
    rungs, source, reached = [], process.inversion_start(len(stops)), torch.zeros_like(stops)
    for move in range(int(counts.max()) if len(counts) else 0):
        target = process.partway(stops, ((move + 1) / counts).clamp(max=1.0))
        destination = process.level(target)
        labels = target if label == "destination" else reached
        rungs.append(Rung(labels, source, destination, move < counts))
        source, reached = destination, target
    return rungs


def official_ladder(process: NoiseProcess, timesteps: Tensor, num_steps: int) -> list[Rung]:
    """Return the moves of the published InPO and SmPO code, which pins diffusers 0.20.

    Labels are source levels ``offset - stride, offset, offset + stride, ...``; the first one is negative and is passed
    to the network as it is. A row moves while the label is below its timestep, so it ends at the next grid level, or at
    the top of the grid.

    Raises:
        UserError: for flow processes, for which no such code exists.
    """
    if not isinstance(process, DiscreteProcess):
        raise UserError(
            "official level matching exists for discrete processes only: use exact matching for flow models"
        )
    check_steps(num_steps, process.num_train_timesteps)
    stops = timesteps.cpu()
    stride = process.num_train_timesteps // num_steps
    rungs = []
    for label in range(process.steps_offset - stride, process.steps_offset + (num_steps - 1) * stride, stride):
        active = label < stops
        if not bool(active.any()):
            break
        labels = torch.full_like(stops, label)
        source = _startable(process, process.level_or_clean(labels))
        destination = process.level(labels + stride)
        rungs.append(Rung(labels, source, destination, active))
    return rungs


def inverted_sigma_ladder(process: FlowProcess, rows: int, num_steps: int) -> list[Rung]:
    """Return the moves of diffusers' flow scheduler with ``invert_sigmas``: levels ``1 - s``, then 1, source labels.

    For comparison only: with a shift other than 1 this is not the sampler's way back.
    """
    sigma = torch.cat([1 - process.sampling_sigmas(num_steps), torch.ones(1)])
    levels = Level(1 - sigma, sigma)
    labels = (sigma[:-1] * process.num_train_timesteps).float()
    return _shared_rungs(labels, levels.select(slice(None, -1)), levels.select(slice(1, None)), rows)


def _source_labels(process: NoiseProcess, timesteps: Tensor, sources: Level, num_steps: int) -> Tensor:
    """Timesteps of the levels that moves start from; below 0 for clean latents of a discrete process."""
    if isinstance(process, DiscreteProcess):
        return timesteps - process.num_train_timesteps // num_steps
    return sources.sigma.to(timesteps.dtype) * process.num_train_timesteps


def _startable(process: NoiseProcess, sources: Level) -> Level:
    """Replace the level of clean latents where the prediction says nothing about noise there."""
    start = process.inversion_start(len(sources.sigma))
    return Level(*(torch.where(sources.sigma == 0, s, o) for s, o in zip(start, sources, strict=True)))


def _shared_rungs(labels: Tensor, sources: Level, destinations: Level, rows: int) -> list[Rung]:
    """Give every row the same moves; labels and levels are (n,)."""
    every = torch.ones(rows, dtype=torch.bool)
    return [
        Rung(
            labels[move].expand(rows),
            sources.select(slice(move, move + 1)).repeat(rows),
            destinations.select(slice(move, move + 1)).repeat(rows),
            every,
        )
        for move in range(len(labels))
    ]


def _flip(level: Level) -> Level:
    return Level(*(part.flip(0) for part in level))
