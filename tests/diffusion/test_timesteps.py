"""Draws of training timesteps."""

from __future__ import annotations

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from diffalign.diffusion.process import DiscreteProcess, FlowProcess
from diffalign.diffusion.timesteps import few_step_timesteps, indices_at
from diffalign.errors import UserError


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_discrete_draws_are_uniform_integers() -> None:
    process = DiscreteProcess.from_scheduler_config({})
    drawn = process.sample_timesteps(20000, generator())
    assert drawn.dtype is torch.long
    counts = torch.bincount(drawn // 100, minlength=10)
    assert counts.sum() == 20000
    assert bool(((counts - 2000).abs() < 200).all())  # 4.7 standard deviations
    assert torch.equal(process.sample_timesteps(5, generator(3)), process.sample_timesteps(5, generator(3)))


def test_flow_draws_are_logit_normal_on_the_shifted_table() -> None:
    process = FlowProcess(shift=3.0)
    drawn = process.sample_timesteps(20000, generator()) / 1000
    unshifted = drawn / (3 - 2 * drawn)  # inverse of the shift
    logits = unshifted.clamp(1e-3, 1 - 1e-3).logit()
    assert float(logits.mean()) == pytest.approx(0, abs=0.03)
    assert float(logits.std()) == pytest.approx(1, abs=0.03)


def test_flow_table_is_the_schedulers() -> None:
    scheduler, process = FlowMatchEulerDiscreteScheduler(shift=3.0), FlowProcess(shift=3.0)
    table = process.timestep_at(torch.arange(999, -1, -1))
    torch.testing.assert_close(table, scheduler.timesteps, rtol=1e-6, atol=1e-4)
    u = torch.tensor([0.0, 0.31, 0.77, 0.9999999])
    picked = process.timestep_at(indices_at(u, 0, 1000))
    torch.testing.assert_close(picked, scheduler.timesteps[(u * 1000).long().clamp(max=999)], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize("distribution", ["uniform", "logit_normal"])
@pytest.mark.parametrize("process", [DiscreteProcess.from_scheduler_config({}), FlowProcess(shift=3.0)])
def test_a_range_bounds_the_draws(process: DiscreteProcess | FlowProcess, distribution: str) -> None:
    drawn = process.sample_timesteps(2000, generator(), low=200, high=300, distribution=distribution)  # type: ignore[arg-type]
    low, high = process.timestep_at(torch.tensor([200, 299]))
    assert low <= drawn.min() < drawn.max() <= high


def test_the_whole_range_can_be_drawn() -> None:
    u = torch.linspace(0, 1, 10001)[:-1]
    assert sorted(set(indices_at(u, 0, 1000).tolist())) == list(range(1000))


@pytest.mark.parametrize(("low", "high"), [(5, 5), (-1, 5), (0, 1001), (7, 3)])
def test_impossible_ranges_are_refused(low: int, high: int) -> None:
    with pytest.raises(UserError, match="non-empty range"):
        FlowProcess().sample_timesteps(1, generator(), low=low, high=high)


def test_unknown_distributions_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'logit_normal'"):
        FlowProcess().sample_timesteps(1, generator(), distribution="logitnormal")  # type: ignore[arg-type]


def test_turbo_models_see_their_four_timesteps_only() -> None:
    drawn = few_step_timesteps(torch.arange(1000))
    assert sorted(set(drawn.tolist())) == [249, 499, 749, 999]
    assert few_step_timesteps(torch.tensor([32, 503, 656])).tolist() == [249, 999, 249]
