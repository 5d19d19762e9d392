"""Deterministic sampling, step for step as stock pipelines sample with DDIM, Euler and flow-matching Euler."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffalign.diffusion.base import NoiseProcess
from diffalign.diffusion.guidance import Predictor
from diffalign.diffusion.level import Grid

Callback = Callable[[int, Tensor], None]
"""(index of the move, latents after it)."""


def sample(
    predict: Predictor,
    process: NoiseProcess,
    latents: Tensor,
    num_steps: int,
    *,
    callback: Callback | None = None,
) -> Tensor:
    """Sample with a number of steps.

    Args:
        predict: (latents, timesteps) -> prediction, guidance included (``guided``).
        process: the noise process of the model.
        latents: (rows, channels, ...) standard normal noise.
        num_steps: moves from noise to image.
        callback: called after each move.

    Returns:
        (rows, channels, ...) clean latents, float32 or float64. Gradients flow if the caller records them.

    Raises:
        UserError: if the number of steps does not fit the process.
    """
    grid = process.sampling_grid(num_steps)
    return follow(predict, process, latents * grid.noise_scale, grid, callback=callback)


def follow(
    predict: Predictor, process: NoiseProcess, latents: Tensor, grid: Grid, *, callback: Callback | None = None
) -> Tensor:
    """Make the moves of a grid; arguments and result as of :func:`sample`, ``latents`` at the grid's first level."""
    grid = grid.to(latents.device)
    for index in range(len(grid)):
        timestep, source, destination = grid.move(index)
        prediction = predict(latents, timestep.expand(len(latents)))
        latents = process.move(prediction, latents, source, destination, clip=True)
        if callback is not None:
            callback(index, latents)
    return latents
