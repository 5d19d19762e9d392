"""Ctrl-U: damped consistency of dense readings, and its place in the training loss."""

from __future__ import annotations

from typing import Any

import torch

from diffalign.rewards.consistency import damped_consistency, ramp, read_classes, read_values
from tests.golden_cases.base import GoldenCase

NUMBERS = (
    "batch_size",
    "min_timestep_rewarding",
    "max_timestep_rewarding",
    "u_scale",
    "grad_scale",
    "global_step",
    "linear_reward_scale_steps",
)


def run(case: GoldenCase) -> dict[str, Any]:
    tasks = {"segmentation", "depth", "hed"}
    case.known(
        {"outputs", "labels", "timesteps", "pretrain_loss"},
        {"task": tasks, "ramp": {True, False}, **dict.fromkeys(NUMBERS)},
    )
    task, scale = case.params["task"], case.params["u_scale"]
    outputs = case.tensor("outputs").requires_grad_()
    first, second = outputs.chunk(2)
    if task == "segmentation":
        readings = read_classes(first, second, case.integers("labels"), scale)
    else:
        labels = case.tensor("labels")
        maps = (x.squeeze(1) if task == "hed" else x for x in (first, second, labels))
        readings = read_values(*maps)
    timesteps = case.integers("timesteps")[: case.params["batch_size"]]
    low, high = case.params["min_timestep_rewarding"], case.params["max_timestep_rewarding"]
    penalty, doubt = damped_consistency(readings, (timesteps >= low) & (timesteps <= high))
    factor = case.params["grad_scale"]
    if case.params["ramp"]:
        factor = ramp(case.params["global_step"], factor, case.params["linear_reward_scale_steps"])
    # Divergences carry the scale already; differences get it here.
    loss = case.inputs["pretrain_loss"] + factor * penalty + (1.0 if task == "segmentation" else scale) * doubt
    return {
        "exp_neg_uncertainty": readings.damping,
        "reward_loss": penalty,
        "uncertainty": doubt,
        "loss": loss,
        "grad_outputs": torch.autograd.grad(loss, outputs)[0],
    }
