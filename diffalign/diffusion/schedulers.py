"""The one place that knows scheduler classes of diffusers: from a scheduler, or its config, to a noise process."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffalign.diffusion.base import NoiseProcess
from diffalign.diffusion.discrete import DDIM, Conventions, DiscreteProcess
from diffalign.diffusion.flow import FlowProcess, SigmaSpacing
from diffalign.errors import UserError, nearest

_SOLVER = Conventions(spacing="linspace", strides=False, clips=None, clean_to_one=None)
_EULER = replace(_SOLVER, scales_noise=True)
_KARRAS = replace(_EULER, betas=("linear", 0.00085, 0.012))
_DDPM = Conventions(clean_to_one=None)
_COGVIDEOX = Conventions(clips=None, betas=("scaled_linear", 0.00085, 0.012), snr_shift=3.0)

# Whatever solver a model ships with, training needs only its process, and sampling here is deterministic DDIM (Euler).
_DISCRETE: Mapping[str, Conventions] = {
    "DDIMScheduler": DDIM,
    "DDIMParallelScheduler": DDIM,
    "DDIMInverseScheduler": DDIM,
    "DDPMScheduler": _DDPM,
    "DDPMParallelScheduler": _DDPM,
    "PNDMScheduler": Conventions(clips=None, clean_to_one=False),
    "CogVideoXDDIMScheduler": _COGVIDEOX,
    "CogVideoXDPMScheduler": _COGVIDEOX,
    "EulerDiscreteScheduler": _EULER,
    "EulerAncestralDiscreteScheduler": _EULER,
    "HeunDiscreteScheduler": replace(_KARRAS, clips=False),
    "LMSDiscreteScheduler": _EULER,
    "KDPM2DiscreteScheduler": _KARRAS,
    "KDPM2AncestralDiscreteScheduler": _KARRAS,
    "DPMSolverMultistepScheduler": _SOLVER,
    "DPMSolverSinglestepScheduler": _SOLVER,
    "DPMSolverSDEScheduler": _KARRAS,
    "DEISMultistepScheduler": _SOLVER,
    "UniPCMultistepScheduler": _SOLVER,
    "SASolverScheduler": _SOLVER,
}
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
_FLOW_PREDICTION = ("flow", "flow_prediction")


def process_from_scheduler(scheduler: Any, *, sigma_spacing: SigmaSpacing | None = None) -> NoiseProcess:
    """Return the noise process of a diffusers scheduler.

    Args:
        scheduler: a scheduler, or the mapping read from its ``scheduler_config.json`` (with ``_class_name``).
        sigma_spacing: for flow, how the model's pipeline spaces its levels; see :class:`FlowProcess`.

    Raises:
        UserError: if the class is unknown, or class, schedule and prediction type contradict each other.
    """
    if isinstance(scheduler, Mapping):
        config, name = scheduler, scheduler.get("_class_name")
    else:
        config, name = scheduler.config, type(scheduler).__name__
    if name is None:
        raise UserError("the scheduler config names no class: expected the key '_class_name', as diffusers writes it")
    prediction = config.get("prediction_type")
    solver_on_flow = bool(config.get("use_flow_sigmas"))
    if name in _FLOW:
        _check_pair(name, prediction in (None, *_FLOW_PREDICTION), prediction, "flow_prediction")
        return FlowProcess.from_scheduler_config(config, sigma_spacing)
    if name not in _DISCRETE:
        raise UserError(
            f"no noise process for the scheduler {name!r}: {nearest(str(name), [*_DISCRETE, *_FLOW])}; "
            "name the scheduler that the model was trained with"
        )
    if solver_on_flow:
        _check_pair(f"{name} with use_flow_sigmas", prediction in _FLOW_PREDICTION, prediction, "flow_prediction")
        return FlowProcess.from_scheduler_config(config, sigma_spacing)
    if config.get("timestep_type") == "continuous":
        raise UserError(f"{name} with continuous timesteps has no discrete process: expected timestep_type 'discrete'")
    suits = prediction in (None, "epsilon", "v_prediction", "sample")
    _check_pair(name, suits, prediction, "epsilon, v_prediction or sample (for flow models: a flow-matching scheduler)")
    return DiscreteProcess.from_scheduler_config(config, _DISCRETE[name])


def _check_pair(scheduler: str, suits: bool, prediction: Any, expected: str) -> None:
    """Refuse a prediction type that the scheduler's process cannot have; sampling would give noise."""
    if not suits:
        raise UserError(f"{scheduler} cannot go with prediction_type {prediction!r}: expected {expected}")
