"""Levels, conversions between parameterisations, and noising, against diffusers and by their own laws."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.diffusion.process import DiscreteProcess, FlowProcess, Level, NoiseProcess
from diffalign.diffusion.schedules import cumulative_alphas, make_betas
from diffalign.errors import UserError

SHAPE = (3, 2, 4, 4)
STABLE_DIFFUSION = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def stable_diffusion(prediction_type: str = "epsilon", **config: object) -> DiscreteProcess:
    return DiscreteProcess.from_scheduler_config(
        {**STABLE_DIFFUSION, "prediction_type": prediction_type, "clip_sample": False, **config}
    )


PROCESSES: dict[str, NoiseProcess] = {
    **{kind: stable_diffusion(kind) for kind in ("epsilon", "v_prediction", "sample")},
    "flow": FlowProcess(shift=3.0),
}


def randn(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape or SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("kind", PROCESSES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), index=st.integers(1, 998))
def test_every_prediction_leads_back_to_image_and_noise(kind: str, seed: int, index: int) -> None:
    process = PROCESSES[kind]
    timesteps = process.timestep_at(torch.tensor([0, index, 999]))
    latents, noise, level = randn(seed), randn(seed + 1), process.level(timesteps)
    noisy = process.add_noise(latents, noise, timesteps)
    prediction = process.target(latents, noise, timesteps)
    torch.testing.assert_close(process.to_x0(prediction, noisy, level), latents, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.to_epsilon(prediction, noisy, level), noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.noise_from(noisy, latents, level), noise, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(process.from_x0_epsilon(latents, noise, level), prediction)


@pytest.mark.parametrize("kind", PROCESSES)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**31), first=st.integers(0, 999), second=st.integers(0, 999))
def test_backtracking_undoes_a_move(kind: str, seed: int, first: int, second: int) -> None:
    process = PROCESSES[kind]
    here, there = (process.level(process.timestep_at(torch.tensor([i, i, i]))) for i in (first, second))
    noisy, prediction = randn(seed), randn(seed + 1)
    moved = process.move(prediction, noisy, here, there)
    torch.testing.assert_close(process.backtrack(prediction, noisy, here, moved, there), noisy, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(process.move(prediction, noisy, here, here), noisy, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", PROCESSES)
def test_a_move_keeps_image_and_noise(kind: str) -> None:
    process = PROCESSES[kind]
    source, destination = (process.level(process.timestep_at(torch.tensor([i]))) for i in (700, 300))
    latents, noise = randn(0), randn(1)
    at, to = source.like(latents), destination.like(latents)
    noisy, prediction = at.alpha * latents + at.sigma * noise, process.from_x0_epsilon(latents, noise, source)
    moved = process.move(prediction, noisy, source, destination)
    torch.testing.assert_close(moved, to.alpha * latents + to.sigma * noise, rtol=1e-9, atol=1e-9)
    back = process.move(process.from_x0_epsilon(latents, noise, destination), moved, destination, source)
    torch.testing.assert_close(back, noisy, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("zero_snr", [False, True])
def test_noising_and_velocity_are_those_of_diffusers(zero_snr: bool) -> None:
    config = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    process, scheduler = stable_diffusion(**config), DDPMScheduler(**STABLE_DIFFUSION, **config)
    timesteps, latents, noise = torch.tensor([0, 500, 999]), randn(0).float(), randn(1).float()
    noisy, target = process.add_noise(latents, noise, timesteps), process.target(latents, noise, timesteps)
    torch.testing.assert_close(noisy, scheduler.add_noise(latents, noise, timesteps), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target, scheduler.get_velocity(latents, noise, timesteps), rtol=1e-5, atol=1e-6)
    assert bool(process.snr(timesteps)[-1] == 0) is zero_snr


def test_half_precision_is_widened_never_computed_in() -> None:
    timesteps, process = torch.tensor([0, 500, 999]), stable_diffusion()
    latents, noise = randn(0).bfloat16(), randn(1).bfloat16()
    noisy = process.add_noise(latents, noise, timesteps)
    assert noisy.dtype is torch.float32
    torch.testing.assert_close(noisy, process.add_noise(latents.float(), noise.float(), timesteps), rtol=0, atol=0)
    assert process.add_noise(latents.double(), noise, timesteps).dtype is torch.float64


def test_published_levels_of_stable_diffusion() -> None:
    published = {0: 0.99915, 1: 0.998296, 101: 0.89298, 501: 0.274999, 901: 0.014005, 999: 0.00466}
    abar = stable_diffusion().level(torch.tensor(list(published))).alpha.square()
    torch.testing.assert_close(abar, torch.tensor(list(published.values()), dtype=torch.float64), rtol=2e-4, atol=0)


def test_levels_of_flow_are_straight() -> None:
    process = FlowProcess(shift=3.0)
    level = process.level(torch.tensor([0.0, 250.0, 1000.0]))
    assert level.alpha.tolist() == [1.0, 0.75, 0.0]
    assert level.sigma.tolist() == [0.0, 0.25, 1.0]
    assert process.snr(torch.tensor([500.0])).item() == pytest.approx(1.0)


def test_clean_levels() -> None:
    assert stable_diffusion(set_alpha_to_one=True).clean_level(2).sigma.tolist() == [0.0, 0.0]
    assert stable_diffusion(set_alpha_to_one=False).clean_level().sigma.item() > 0
    assert FlowProcess().clean_level(2).alpha.tolist() == [1.0, 1.0]
    # An image-predicting network cannot tell the noise of noiseless latents: inversion starts just above.
    assert stable_diffusion("sample", set_alpha_to_one=True).inversion_start().sigma.item() > 0


def test_a_level_repeats_and_joins() -> None:
    one = Level(torch.tensor([0.6]), torch.tensor([0.8]))
    assert Level.cat([one, one.repeat(2)]).alpha.tolist() == pytest.approx([0.6] * 3)
    assert one.like(torch.zeros(1, 2, 3, dtype=torch.float16)).sigma.shape == (1, 1, 1)


@pytest.mark.parametrize("timesteps", [torch.tensor([-1]), torch.tensor([1000]), torch.tensor([5.0])])
def test_discrete_timesteps_out_of_range_or_kind_are_refused(timesteps: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected 0 \.\. 999|takes integer"):
        stable_diffusion().level(timesteps)


@pytest.mark.parametrize("timesteps", [torch.tensor([-1.0]), torch.tensor([1000.5]), torch.tensor([5])])
def test_flow_timesteps_out_of_range_or_kind_are_refused(timesteps: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"expected timesteps in|takes floating"):
        FlowProcess().level(timesteps)


def test_contradictions_are_refused() -> None:
    abar = cumulative_alphas(make_betas())
    with pytest.raises(UserError, match="zero terminal SNR"):
        DiscreteProcess(cumulative_alphas(make_betas(), zero_terminal_snr=True), "epsilon")
    with pytest.raises(UserError, match="cannot predict flow"):
        DiscreteProcess(abar, "flow")
    with pytest.raises(UserError, match="did you mean 'epsilon'"):
        DiscreteProcess(abar, "epsilom")
    with pytest.raises(UserError, match="did you mean 'trailing'"):
        DiscreteProcess(abar, timestep_spacing="trailling")
    with pytest.raises(UserError, match="positive"):
        FlowProcess(shift=0.0)
    with pytest.raises(UserError, match="sigma spacing"):
        FlowProcess(sigma_spacing="evenly")
    with pytest.raises(UserError, match="beta schedule"):
        make_betas("scaled_linea")
