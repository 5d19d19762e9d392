"""Stochastic steps: published numbers, their limits, and the marginals they must keep."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal

from diffalign.diffusion.process import DiscreteProcess, FlowProcess, Level
from diffalign.diffusion.sde import (
    ddim_std,
    ddim_transition,
    flow_transition,
    gaussian_kl,
    growing_noise_level,
    noisy_destinations,
    stochastic_grid,
)
from diffalign.errors import UserError

PUBLISHED = Path(__file__).parent / "golden_steps"
CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


class Published:
    """One case of a golden file, as tensors."""

    def __init__(self, file: str, name: str) -> None:
        cases = json.loads((PUBLISHED / f"{file}.json").read_text())["cases"]
        self.case = next(case for case in cases if case["name"] == name)
        self.params, self.tolerance = self.case["params"], self.case["tolerance"]

    def __getitem__(self, key: str) -> Tensor:
        value = torch.tensor(self.case["inputs"][key])
        return value.double() if value.is_floating_point() else value

    def check(self, **got: Tensor) -> None:
        for key, value in got.items():
            want = torch.tensor(self.case["expected"][key], dtype=value.dtype)
            torch.testing.assert_close(
                value, want, rtol=self.tolerance, atol=self.tolerance, msg=lambda m, k=key: k + m
            )


def sigma_level(sigma: Tensor) -> Level:
    return Level(1 - sigma, sigma)


@pytest.mark.parametrize("name", ["ddim_step_eps_ppo", "ddim_step_v_prediction"])
def test_ddim_steps_of_ddpo(name: str) -> None:
    case = Published("ddpo", name)
    process = DiscreteProcess.from_scheduler_config(
        {**case.params["scheduler"], "prediction_type": case.params["prediction_type"]}
    )
    destinations = noisy_destinations(case["timestep"], 1000, case.params["num_inference_steps"])
    assert torch.equal(destinations, case["prev_timestep"])
    levels = process.level(case["timestep"]), process.level(destinations)
    torch.testing.assert_close(levels[0].alpha.square(), case["alphas_cumprod_t"], rtol=1e-6, atol=0)
    old = ddim_transition(process, case["model_output_old"], case["sample"], *levels, case.params["eta"])
    new = ddim_transition(process, case["model_output"], case["sample"], *levels, case.params["eta"])
    drawn = old.sample(case["noise"])
    case.check(prev_sample=drawn, log_prob_old=old.log_prob(drawn), log_prob=new.log_prob(drawn))


def test_flow_grpo_step() -> None:
    case = Published("flow_grpo", "sde_step_and_loss_4steps_shift3")
    sigmas, index = case["sigmas"], case["step_index"]
    source, destination = sigma_level(sigmas[index]), sigma_level(sigmas[index + 1])
    noise_level = growing_noise_level(sigmas[index], sigmas[1], case.params["noise_level"])
    old, new, reference = (
        flow_transition(case[key], case["sample"], source, destination, noise_level)
        for key in ("velocity_old", "velocity", "velocity_ref")
    )
    drawn = old.sample(case["noise"])
    case.check(
        std_dev_t=noise_level,
        prev_sample_mean_old=old.mean,
        prev_sample=drawn,
        log_prob_old=old.log_prob(drawn),
        prev_sample_mean=new.mean,
        log_prob=new.log_prob(drawn),
        kl_loss=gaussian_kl(new.mean, reference.mean, noise_level).mean(),
        kl_per_sample_with_dt=gaussian_kl(new.mean, reference.mean, new.std),
    )


def test_dance_grpo_step() -> None:
    case = Published("flow_grpo", "dance_step_eta03")
    index = case.params["step_index"]
    source, destination = (sigma_level(case["sigmas"][i : i + 1]) for i in (index, index + 1))
    velocity = case["velocity"].requires_grad_()
    old = flow_transition(case["velocity_old"], case["sample"], source, destination, case.params["eta"])
    new = flow_transition(velocity, case["sample"], source, destination, case.params["eta"])
    drawn = old.sample(case["noise"])
    log_prob = new.log_prob(drawn)
    case.check(
        prev_sample=drawn,
        pred_x0=FlowProcess().to_x0(case["velocity_old"], case["sample"], source),
        log_prob_old=old.log_prob(drawn),
        log_prob=log_prob,
        grad_sum_log_prob_wrt_velocity=torch.autograd.grad(log_prob.sum(), velocity)[0],
    )


def test_pref_grpo_step() -> None:
    case = Published("pref_grpo", "flow_step_rationorm")
    index = case.params["step_index"]
    source, destination = (sigma_level(case["sigmas"][i : i + 1]) for i in (index, index + 1))
    noise_level = growing_noise_level(source.sigma, case["sigmas"][1], case.params["eta"])
    old, new, reference = (
        flow_transition(case[key], case["sample"], source, destination, noise_level)
        for key in ("velocity_old", "velocity", "velocity_ref")
    )
    drawn = old.sample(case["noise"])
    case.check(
        prev_sample=drawn,
        noise_scale=old.std[0],
        dt=(destination.sigma - source.sigma)[0],
        log_prob_old=old.log_prob(drawn),
        log_prob=new.log_prob(drawn),
        kl_loss=gaussian_kl(new.mean, reference.mean, new.std).mean(),
    )


def step(prediction_type: str = "epsilon", **options: Any) -> tuple[DiscreteProcess, Level, Level]:
    process = DiscreteProcess.from_scheduler_config({**CONFIG, "prediction_type": prediction_type, **options})
    timesteps = torch.tensor([951, 501, 1])
    return process, process.level(timesteps), process.level(noisy_destinations(timesteps, 1000, 20))


def randn(seed: int) -> Tensor:
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_log_prob_is_the_mean_of_the_normal_log_density() -> None:
    process, *levels = step()
    transition = ddim_transition(process, randn(0), randn(1), *levels, eta=0.7)
    drawn = transition.sample(randn(2))
    density = Normal(transition.mean, transition.std.reshape(3, 1, 1, 1)).log_prob(drawn)
    torch.testing.assert_close(transition.log_prob(drawn), density.flatten(1).mean(1))


def test_prediction_types_of_one_network_give_one_transition() -> None:
    noise, noisy, expected = randn(0), randn(1), None
    for kind in ("epsilon", "v_prediction", "sample"):
        process, *levels = step(kind)
        x0 = step()[0].to_x0(noise, noisy, levels[0])
        transition = ddim_transition(process, process.from_x0_epsilon(x0, noise, levels[0]), noisy, *levels, eta=1.0)
        expected = transition if expected is None else expected
        torch.testing.assert_close(transition.mean, expected.mean)
        torch.testing.assert_close(transition.std, expected.std)


def test_full_eta_is_the_posterior_of_the_strided_chain() -> None:
    process, source, destination = step()
    abar, abar_to = source.alpha.square(), destination.alpha.square()
    kept = abar / abar_to
    std = ddim_std(source, destination, 1.0)
    torch.testing.assert_close(std.square(), (1 - abar_to) / (1 - abar) * (1 - kept), rtol=1e-6, atol=0)
    x0, noisy = randn(0), randn(1)
    noise = process.noise_from(noisy, x0, source)
    mean = ddim_transition(process, noise, noisy, source, destination, eta=1.0).mean
    of_x0 = abar_to.sqrt() * (1 - kept) / (1 - abar)
    of_noisy = kept.sqrt() * (1 - abar_to) / (1 - abar)
    shaped = [weight.reshape(3, 1, 1, 1) for weight in (of_x0, of_noisy)]
    torch.testing.assert_close(mean, shaped[0] * x0 + shaped[1] * noisy, rtol=1e-6, atol=1e-8)


def test_gradient_of_the_log_prob_is_that_of_the_sheet() -> None:
    process, source, destination = step()
    noise = randn(0).requires_grad_()
    transition = ddim_transition(process, noise, randn(1), source, destination, eta=1.0)
    drawn = transition.sample(randn(2))
    (got,) = torch.autograd.grad(transition.log_prob(drawn).sum(), noise)
    std = transition.std
    slope = (destination.sigma.square() - std.square()).sqrt() - destination.alpha * source.sigma / source.alpha
    scale = (slope / std.square() / noise[0].numel()).reshape(3, 1, 1, 1)
    torch.testing.assert_close(got, (scale * (drawn - transition.mean)).detach())


def test_no_density_without_randomness() -> None:
    process, *levels = step()
    for eta in (0.0, -1.0):
        with pytest.raises(UserError, match="no log-probability"):
            ddim_transition(process, randn(0), randn(1), *levels, eta=eta)


@pytest.mark.parametrize(("offset", "steps"), [(0, 10), (1, 10), (0, 7)])
def test_every_step_of_a_stochastic_grid_has_a_density(offset: int, steps: int) -> None:
    process = DiscreteProcess.from_scheduler_config({**CONFIG, "steps_offset": offset, "set_alpha_to_one": True})
    grid = stochastic_grid(process, steps)
    assert len(grid) == steps - (offset == 0)
    assert bool((ddim_std(grid.sources, grid.destinations, 1.0) > 0).all())
    assert len(stochastic_grid(FlowProcess(), steps)) == steps


def test_no_noise_is_eulers_step() -> None:
    process, source, destination = FlowProcess(), *(sigma_level(torch.tensor([s])) for s in (0.8, 0.5))
    transition = flow_transition(randn(0), randn(1), source, destination, 0.0)
    torch.testing.assert_close(transition.mean, process.move(randn(0), randn(1), source, destination))
    assert transition.std.item() == 0


def test_drift_form_and_score_give_the_same_mean() -> None:
    """The released mean is x + (v - g^2/2 score) dt with score = -(x + (1 - s) v) / s."""
    velocity, noisy, s, to, g = randn(0), randn(1), 0.8, 0.6, 0.9
    score = -(noisy + (1 - s) * velocity) / s
    expected = noisy + (velocity - g**2 / 2 * score) * (to - s)
    levels = [sigma_level(torch.tensor([value], dtype=torch.float64)) for value in (s, to)]
    torch.testing.assert_close(flow_transition(velocity, noisy, *levels, g).mean, expected)


def test_noise_level_is_finite_at_pure_noise() -> None:
    sigma, second = torch.tensor([1.0, 0.5]), torch.tensor(0.9)
    expected = [0.7 * math.sqrt(1 / 0.1), 0.7]
    torch.testing.assert_close(growing_noise_level(sigma, second), torch.tensor(expected))


@pytest.mark.parametrize("scale", [0.3, 0.7])
def test_the_sde_keeps_the_marginals_of_the_flow(scale: float) -> None:
    """Images N(0, 0.5^2) with their exact velocity: the variance at each level is (1 - s)^2 / 4 + s^2."""
    generator, sigmas = torch.Generator().manual_seed(0), torch.linspace(1, 0.1, 91, dtype=torch.float64)
    x = torch.randn(20000, 1, generator=generator, dtype=torch.float64)
    for index in range(len(sigmas) - 1):
        s = sigmas[index]
        variance = (1 - s) ** 2 / 4 + s**2
        velocity = (s - (1 - s) / 4) / variance * x  # E[noise - image | x]
        source, destination = sigma_level(sigmas[index : index + 1]), sigma_level(sigmas[index + 1 : index + 2])
        noise_level = growing_noise_level(sigmas[index : index + 1], sigmas[1], scale)
        transition = flow_transition(velocity, x, source, destination, noise_level)
        x = transition.sample(torch.randn(x.shape, generator=generator, dtype=torch.float64))
    assert float(x.var()) == pytest.approx(0.9**2 / 4 + 0.1**2, rel=0.05)


def test_raising_the_log_prob_moves_the_mean_towards_the_latents() -> None:
    process, *levels = step()
    noise, noisy = randn(0).requires_grad_(), randn(1)
    before = ddim_transition(process, noise, noisy, *levels, eta=1.0)
    drawn = before.sample(randn(2))
    (gradient,) = torch.autograd.grad(before.log_prob(drawn).sum(), noise)
    after = ddim_transition(process, noise + 1e-3 * gradient, noisy, *levels, eta=1.0)
    distance = [(t.mean - drawn).square().flatten(1).sum(1) for t in (after, before)]
    assert bool((distance[0] < distance[1]).all())


def test_half_precision_is_widened() -> None:
    process, *levels = step()
    half = [randn(seed).bfloat16() for seed in (0, 1)]
    assert ddim_transition(process, *half, *levels, eta=1.0).mean.dtype is torch.float32
    flow = [sigma_level(torch.tensor([value])) for value in (0.8, 0.5)]
    assert flow_transition(*half, *flow, 0.7).mean.dtype is torch.float32
