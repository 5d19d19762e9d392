"""Sampling, step for step against the schedulers of diffusers."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from diffalign.diffusion.process import FlowProcess, process_from_scheduler
from diffalign.diffusion.sampling import follow, sample
from diffalign.errors import UserError

STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
    """A smooth stand-in for a denoiser."""
    time = (timesteps.to(latents) / 1000).reshape(-1, 1, 1, 1)
    return 0.5 * latents.sin() + 0.2 * time * latents - 0.1 * time


def noise(seed: int = 0) -> Tensor:
    return torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(seed))


def stock(scheduler: Any, latents: Tensor, num_steps: int, **set_timesteps: Any) -> Tensor:
    """Sample as a stock pipeline does."""
    scheduler.set_timesteps(num_steps, **set_timesteps)
    latents = latents * getattr(scheduler, "init_noise_sigma", 1.0)
    for timestep in scheduler.timesteps:
        seen = scheduler.scale_model_input(latents, timestep) if hasattr(scheduler, "scale_model_input") else latents
        latents = scheduler.step(predict(seen, timestep.expand(2)), timestep, latents, return_dict=False)[0]
    return latents


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("num_steps", [1, 7, 10])
def test_ddim(prediction_type: str, spacing: str, to_one: bool, num_steps: int) -> None:
    scheduler = diffusers.DDIMScheduler(
        **STABLE_DIFFUSION,
        prediction_type=prediction_type,
        timestep_spacing=spacing,
        set_alpha_to_one=to_one,
        clip_sample=False,
        steps_offset=1 if spacing == "leading" else 0,
    )
    got = sample(predict, process_from_scheduler(scheduler), noise(), num_steps)
    torch.testing.assert_close(got, stock(scheduler, noise(), num_steps), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{"clip_sample": True, "clip_sample_range": 0.7}, {"rescale_betas_zero_snr": True}])
def test_ddim_with_clipping_and_with_zero_terminal_snr(options: dict[str, Any]) -> None:
    scheduler = diffusers.DDIMScheduler(
        **{**STABLE_DIFFUSION, "clip_sample": False, **options},
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    got = sample(predict, process_from_scheduler(scheduler), noise(), 9)
    assert got.isfinite().all()
    torch.testing.assert_close(got, stock(scheduler, noise(), 9), rtol=1e-5, atol=1e-5)


def test_cogvideox_ddim() -> None:
    scheduler = diffusers.CogVideoXDDIMScheduler(
        prediction_type="v_prediction", rescale_betas_zero_snr=True, timestep_spacing="trailing", snr_shift_scale=1.0
    )
    got = sample(predict, process_from_scheduler(scheduler), noise(), 6)
    torch.testing.assert_close(got, stock(scheduler, noise(), 6), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_euler(spacing: str, num_steps: int) -> None:
    """Euler's variance-exploding latents end where ours do: at clean latents."""
    scheduler = diffusers.EulerDiscreteScheduler(**STABLE_DIFFUSION, timestep_spacing=spacing)
    got = sample(predict, process_from_scheduler(scheduler), noise(), num_steps)
    torch.testing.assert_close(got, stock(scheduler, noise(), num_steps), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [1, 4, 7])
def test_flow_matching_euler(shift: float, num_steps: int) -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    process = process_from_scheduler(scheduler)
    expected = stock(scheduler, noise(), num_steps)
    torch.testing.assert_close(sample(predict, process, noise(), num_steps), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(process.sampling_grid(num_steps).timesteps, scheduler.timesteps, rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("kind", ["exponential", "linear"])
@pytest.mark.parametrize("terminal", [None, 0.1])
def test_dynamic_shift_and_terminal_stretch(kind: str, terminal: float | None) -> None:
    """As the pipelines of FLUX and LTX sample: uniform levels, shifted by the number of image tokens."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, time_shift_type=kind, shift_terminal=terminal
    )
    process = process_from_scheduler(scheduler)
    assert isinstance(process, FlowProcess)
    assert process.dynamic_shift is not None
    mu = process.dynamic_shift.mu(1024)
    assert mu == pytest.approx(0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256))
    uniform = [1.0, 0.75, 0.5, 0.25]
    got = sample(predict, process.at_resolution(1024), noise(), 4)
    torch.testing.assert_close(got, stock(scheduler, noise(), 4, sigmas=uniform, mu=mu), rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="at_resolution"):
        process.sampling_grid(4)


def test_levels_of_a_solver_with_flow_sigmas() -> None:
    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    scheduler.set_timesteps(6)
    levels = process_from_scheduler(scheduler).sampling_grid(6).levels
    torch.testing.assert_close(levels.sigma.float(), scheduler.sigmas, rtol=0, atol=2e-6)


def test_a_single_chosen_timestep_gives_the_predicted_image() -> None:
    process = process_from_scheduler(diffusers.DDPMScheduler(**STABLE_DIFFUSION, clip_sample=False))
    grid = process.grid_through([400])
    latents = noise()
    x0 = process.to_x0(predict(latents, torch.tensor([400, 400])), latents, process.level(torch.tensor([400])))
    torch.testing.assert_close(follow(predict, process, latents, grid), x0)


def test_callback_sees_every_step_and_gradients_flow() -> None:
    process, seen = FlowProcess(), []
    latents = noise().requires_grad_()
    end = sample(predict, process, latents, 3, callback=lambda index, value: seen.append((index, value)))
    assert [index for index, _ in seen] == [0, 1, 2]
    assert seen[-1][1] is end
    (gradient,) = torch.autograd.grad(end.sum(), latents)
    assert gradient.abs().min() > 0


@pytest.mark.parametrize("num_steps", [0, 1001])
def test_impossible_numbers_of_steps_are_refused(num_steps: int) -> None:
    for process in (process_from_scheduler(diffusers.DDIMScheduler()), FlowProcess()):
        with pytest.raises(UserError, match="expected 1 to 1000"):
            process.sampling_grid(num_steps)


def test_an_offset_beyond_the_last_timestep_is_refused() -> None:
    with pytest.raises(UserError, match="beyond the last one"):
        process_from_scheduler(diffusers.DDIMScheduler(steps_offset=1)).sampling_grid(1000)
