"""From scheduler configs of diffusers to noise processes: tables to the last bit, contradictions refused."""

from __future__ import annotations

import inspect
from typing import Any

import diffusers
import pytest
import torch

from diffalign.diffusion.process import DiscreteProcess, FlowProcess, process_from_scheduler
from diffalign.diffusion.schedulers import _DISCRETE
from diffalign.errors import UserError


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize(
    "betas",
    [
        {"beta_schedule": "linear"},
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 500},
        {"beta_schedule": "sigmoid"},
        {"trained_betas": [0.001, 0.01, 0.1, 0.2], "num_train_timesteps": 4},
    ],
    ids=["linear", "scaled_linear", "cosine", "sigmoid", "trained"],
)
def test_tables_equal_those_of_diffusers(betas: dict[str, Any], zero_snr: bool) -> None:
    config = {**betas, "rescale_betas_zero_snr": zero_snr, "prediction_type": "v_prediction"}
    scheduler = diffusers.DDPMScheduler(**config)
    abar = process_from_scheduler(scheduler).alphas_cumprod
    torch.testing.assert_close(abar, scheduler.alphas_cumprod.double(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_cogvideox_shifts_the_signal_to_noise_ratio(zero_snr: bool) -> None:
    scheduler = diffusers.CogVideoXDDIMScheduler(
        rescale_betas_zero_snr=zero_snr, snr_shift_scale=1.7, prediction_type="v_prediction"
    )
    abar = process_from_scheduler(scheduler).alphas_cumprod
    torch.testing.assert_close(abar, scheduler.alphas_cumprod.double(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in _DISCRETE if name != "DPMSolverSDEScheduler"])
def test_defaults_of_a_bare_config_are_those_of_the_class(name: str) -> None:
    parameters = inspect.signature(getattr(diffusers, name).__init__).parameters.values()
    stated = {p.name: p.default for p in parameters if p.default is not p.empty}
    bare, full = (process_from_scheduler({"_class_name": name, **options}) for options in ({}, stated))
    assert isinstance(bare, DiscreteProcess)
    assert isinstance(full, DiscreteProcess)
    read = ("prediction_type", "clip_range", "timestep_spacing", "steps_offset", "clean_alpha_to_one")
    torch.testing.assert_close(bare.alphas_cumprod, full.alphas_cumprod)
    assert [getattr(bare, key) for key in read] == [getattr(full, key) for key in read]


def test_flow_matching_configs() -> None:
    sd3 = process_from_scheduler({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0})
    flux = process_from_scheduler(
        {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True, "max_shift": 1.2, "shift": 3.0}
    )
    wan = process_from_scheduler(
        {
            "_class_name": "UniPCMultistepScheduler",
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 5.0,
        }
    )
    assert isinstance(sd3, FlowProcess)
    assert isinstance(flux, FlowProcess)
    assert isinstance(wan, FlowProcess)
    assert (sd3.shift, sd3.sigma_spacing, sd3.dynamic_shift) == (3.0, "table", None)
    assert flux.sigma_spacing == "uniform"
    assert flux.dynamic_shift is not None
    assert flux.dynamic_shift.mu(4096) == pytest.approx(1.2)
    assert (wan.shift, wan.sigma_spacing) == (5.0, "solver")


FLOW = "FlowMatchEulerDiscreteScheduler"


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"_class_name": "DDIMScheduler", "prediction_type": "flow_prediction"}, "DDIMScheduler cannot go with"),
        ({"_class_name": "EulerDiscreteScheduler", "prediction_type": "flow"}, "flow-matching scheduler"),
        ({"_class_name": FLOW, "prediction_type": "epsilon"}, "expected flow_prediction"),
        ({"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas cannot go with"),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "cannot go with"),
        ({"_class_name": "DDIMScheduler", "rescale_betas_zero_snr": True}, "zero terminal SNR"),
        ({"_class_name": "DDIMScheduler", "thresholding": True}, "thresholding"),
        ({"_class_name": "EulerDiscreteScheduler", "timestep_type": "continuous"}, "continuous"),
        ({"_class_name": FLOW, "use_karras_sigmas": True, "invert_sigmas": True}, "invert_sigmas, use_karras_sigmas"),
        ({"_class_name": "EDMEulerScheduler"}, "did you mean"),
        ({"_class_name": "DDIMSheduler"}, "did you mean 'DDIMScheduler'"),
        ({"beta_schedule": "linear"}, "_class_name"),
    ],
)
def test_contradictory_or_unknown_schedulers_are_refused(config: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        process_from_scheduler(config)
