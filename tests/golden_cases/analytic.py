"""What golden files share: noise processes given by scheduler parameters, and networks given by a formula."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffalign.diffusion.discrete import DiscreteProcess
from diffalign.diffusion.guidance import Predictor

SCHEDULER_PARAMS: dict[str, Any] = {
    "num_train_timesteps": None,
    "beta_start": None,
    "beta_end": None,
    "beta_schedule": {"scaled_linear"},
    "clip_sample": {True, False},
    "set_alpha_to_one": {True, False},
    "steps_offset": None,
    "prediction_type": {"epsilon", "v_prediction", "sample"},
    "timestep_spacing": {"leading", "trailing", "linspace"},
    "rescale_betas_zero_snr": {True, False},
}
"""Parameters that name a scheduler, for :meth:`GoldenCase.known`."""


def scheduler_process(params: Mapping[str, Any]) -> DiscreteProcess:
    """Build the process of a case from the scheduler parameters among its own."""
    config = {name: value for name, value in params.items() if name in SCHEDULER_PARAMS}
    return DiscreteProcess.from_scheduler_config(config)


def polynomial_network(p: Tensor, context: Tensor | float = 0.0) -> Predictor:
    """``p0 x + p1 t/1000 + p2 x t/1000 + p3 sin x (+ p4 c x)``; ``context`` is a number, or one a row."""

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        shape = (-1, *[1] * (latents.dim() - 1))
        time = (timesteps.to(latents.dtype) / 1000).reshape(shape)
        output = p[0] * latents + p[1] * time + p[2] * latents * time + p[3] * latents.sin()
        if len(p) == 4:
            return output
        seen = context.reshape(shape) if isinstance(context, Tensor) else context
        return output + p[4] * seen * latents

    return predict
