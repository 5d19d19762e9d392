"""Sampling as one differentiable function: which steps carry a gradient is said move by move.

Steps with a gradient are checkpointed: of each, only the latents before it are kept, and its activations are computed
again in backward, one step at a time (arXiv 2310.03739, section 4). The memory of a chain is that of one step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffalign.diffusion.base import NoiseProcess
from diffalign.diffusion.discrete import DiscreteProcess
from diffalign.diffusion.guidance import Predictor
from diffalign.diffusion.level import Grid
from diffalign.diffusion.sde import StepNoise, ddim_transition


def sample_with_gradient(
    predict: Predictor,
    process: NoiseProcess,
    latents: Tensor,
    grid: Grid,
    live: Sequence[bool],
    *,
    first: int = 0,
    eta: float = 0.0,
    step_noise: StepNoise | None = None,
    checkpointing: bool = True,
) -> Tensor:
    """Make moves of a grid, with a graph through the predictions of some of them.

    A move that is not live takes its prediction for a constant. What it does to the latents stays in the graph, so that
    a live move before it keeps its gradient; if all before it are constants too, nothing of it is recorded.

    Args:
        predict: (latents, timesteps) -> prediction, guidance included.
        process: the noise process of the model.
        latents: (rows, channels, ...) at the level that the first move starts from.
        grid: the moves.
        live: for each move to make, from ``first`` on, whether its prediction carries a gradient.
        first: index of the first move.
        eta: share of DDIM's randomness in each move of a discrete process, 0 .. 1; flow processes have none.
        step_noise: the noise of a move; needed where ``eta`` is above 0.
        checkpointing: compute activations of live predictions again in backward instead of keeping them.

    Returns:
        (rows, channels, ...) latents after the last move made, float32 or float64.
    """
    grid = grid.to(latents.device)
    random = eta > 0 and isinstance(process, DiscreteProcess)
    for index, carries_gradient in enumerate(live, first):
        timestep, source, destination = grid.move(index)
        timesteps = timestep.expand(len(latents))
        if carries_gradient and checkpointing and torch.is_grad_enabled():
            prediction = checkpoint(predict, latents, timesteps, use_reentrant=False)
        else:
            with torch.set_grad_enabled(carries_gradient and torch.is_grad_enabled()):
                prediction = predict(latents, timesteps)
        if not random:
            latents = process.move(prediction, latents, source, destination, clip=True)
        elif step_noise is None:
            raise ValueError("moves with eta above 0 need their noise")
        else:
            transition = ddim_transition(process, prediction, latents, source, destination, eta)
            latents = transition.sample(step_noise(index))
    return latents
