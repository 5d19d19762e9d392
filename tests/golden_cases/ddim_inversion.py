"""Inversion along the sampler's grid: naive, fixed point, rectified flow."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign.batch import Condition
from diffalign.diffusion.flow import FlowProcess
from diffalign.diffusion.guidance import Predictor, guided
from diffalign.diffusion.inversion import (
    FixedPoint,
    InversionPath,
    Refinement,
    climb_path,
    invert_path,
    round_trip_error,
)
from diffalign.diffusion.ladders import inverted_sigma_ladder
from diffalign.diffusion.sampling import follow
from tests.golden_cases.analytic import SCHEDULER_PARAMS, polynomial_network, scheduler_process
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    if "shift" in case.params:
        return _flow(case)
    if "num_renoise_steps" in case.params:
        return _refined(case)
    return _naive(case)


def _network(case: GoldenCase) -> Predictor:
    """The case's network under guidance between its two contexts."""
    weights, (null, caption) = case.tensor("network_params"), case.tensor("context")
    rows = len(case.inputs["x0"])

    def denoise(latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return polynomial_network(weights, condition.tensors["context"])(latents, timesteps)

    conditions = [Condition({"context": value.expand(rows)}) for value in (caption, null)]
    return guided(denoise, *conditions, case.params["guidance_scale"])


def _naive(case: GoldenCase) -> dict[str, Any]:
    case.known({"x0", "network_params", "context"}, {"num_steps": None, "guidance_scale": None, **SCHEDULER_PARAMS})
    process, predict, steps = scheduler_process(case.params), _network(case), case.params["num_steps"]
    path = invert_path(predict, process, case.tensor("x0"), steps, clip=True)
    images = [
        process.clip(process.to_x0(prediction, latents, path.sources.select(slice(move, move + 1))))
        for move, (prediction, latents) in enumerate(zip(path.predictions, path.latents, strict=False))
    ]
    return {
        "timesteps": path.timesteps,
        "abar_at_timesteps": path.destinations.alpha.square(),
        "abar_start": process.inversion_start().alpha.square().item(),
        "trajectory": _stack(path),
        "pred_x0": torch.stack(images),
        "sampled_back_x0": follow(predict, process, path.latents[-1], process.sampling_grid(steps)),
    }


def _refined(case: GoldenCase) -> dict[str, Any]:
    own: dict[str, Any] = {
        "num_steps": None,
        "guidance_scale": None,
        "num_renoise_steps": None,
        "average_latent_estimations": {True, False},
        "average_first_step_range": None,
        "average_step_range": None,
        "max_num_renoise_steps_first_step": None,
        "first_step_max_timestep": None,
    }
    case.known({"x0", "network_params", "context"}, {**own, **SCHEDULER_PARAMS})
    params, process, predict = case.params, scheduler_process(case.params), _network(case)
    passes, average = params["num_renoise_steps"], params["average_latent_estimations"]
    refinement = Refinement(
        usual=FixedPoint(passes, tuple(params["average_step_range"]) if average else None),
        early=FixedPoint(
            min(passes, params["max_num_renoise_steps_first_step"]),
            tuple(params["average_first_step_range"]) if average else None,
        ),
        early_below=params["first_step_max_timestep"],
    )
    calls: list[Tensor] = []

    def counted(latents: Tensor, timesteps: Tensor) -> Tensor:
        calls.append(timesteps[0])
        return predict(latents, timesteps)

    x0, steps = case.tensor("x0"), params["num_steps"]
    path = invert_path(counted, process, x0, steps, refinement=refinement)
    return {
        "timesteps_ascending": path.timesteps,
        "network_calls": torch.stack(calls),
        "trajectory": _stack(path),
        "sampled_back_x0": follow(predict, process, path.latents[-1], process.sampling_grid(steps)),
        "sample_back_max_abs_error": round_trip_error(predict, process, x0, steps, refinement=refinement).max().item(),
    }


def _flow(case: GoldenCase) -> dict[str, Any]:
    case.known({"x0", "network_params"}, {"num_steps": None, "shift": None, "invert_sigmas": {True, False}})
    steps, x0, predict = case.params["num_steps"], case.tensor("x0"), polynomial_network(case.tensor("network_params"))
    process = FlowProcess(case.params["shift"], sigma_spacing="uniform")
    if case.params.get("invert_sigmas", False):
        path = climb_path(predict, process, x0, inverted_sigma_ladder(process, len(x0), steps))
        sigmas = torch.cat([path.sources.sigma, path.destinations.sigma[-1:]])
        return {"sigmas": sigmas, "timesteps": path.timesteps, "trajectory": _stack(path)}
    path, grid, back = invert_path(predict, process, x0, steps), process.sampling_grid(steps), []
    follow(predict, process, path.latents[-1], grid, callback=lambda _, latents: back.append(latents))
    return {
        "sampling_sigmas": grid.levels.sigma,
        "sampling_timesteps": grid.timesteps,
        "inversion_trajectory": _stack(path),
        "official_sampling_trajectory_from_last": torch.stack(back),
    }


def _stack(path: InversionPath) -> Tensor:
    """Latents after each move, (n, rows, channels, height, width)."""
    return torch.stack(list(path.latents[1:]))
