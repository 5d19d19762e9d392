"""Pref-GRPO: win rates and combined advantages; one step with plain and with normalised ratios."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from diffalign.diffusion.sde import (
    Transition,
    flow_transition,
    gaussian_kl,
    growing_noise_level,
    normalised_log_ratio,
)
from diffalign.rewards.transforms import duel_win_rates
from diffalign.strategies.advantages import combined_advantages
from diffalign.strategies.base import LossOutput, Terms
from diffalign.strategies.on_policy import PolicyGradientConfig, PolicyObjective
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.on_policy import flow_levels, gradient, transition_batch

DECIMALS = 3
"""To which the released code rounds win rates."""


def run(case: GoldenCase) -> dict[str, Any]:
    return _advantages(case) if "pairs" in case.inputs else _step(case)


def _advantages(case: GoldenCase) -> dict[str, Any]:
    case.known(
        {"pairs", "outcomes", "clip_scores"},
        {
            "num_items": None,
            "reward_weights": {"win_rate": None, "clip": None},
            "apply_batch_normalisation": {True, False},
            "eps": None,
            "std": {"unbiased (ddof=1)"},
        },
    )
    # stored: 1 the first won, 2 the second did, 0 a tie, or a verdict that could not be read
    points = torch.tensor([0.5, 1.0, 0.0], dtype=case.dtype)[case.indices("outcomes", 3)]
    unrounded = duel_win_rates(case.indices("pairs", case.params["num_items"]), points, case.params["num_items"])
    rates = unrounded.round(decimals=DECIMALS)
    total, parts = combined_advantages(
        {"win_rate": rates, "clip": case.tensor("clip_scores")},
        case.params["reward_weights"],
        torch.zeros(len(rates), dtype=torch.long),
        renormalise=case.params["apply_batch_normalisation"],
        eps=case.params["eps"],
    )
    return {
        "win_rate": rates,
        "win_rate_unrounded": unrounded,
        "advantages": total,
        "advantages_per_reward": {name: part.tolist() for name, part in parts.items()},
    }


def _step(case: GoldenCase) -> dict[str, Any]:
    velocities = {"velocity_old", "velocity", "velocity_ref"}
    case.known(
        {"sigmas", "sample", "noise", "advantages", *velocities},
        {"step_index": None, "eta": None, "clip_range": None, "kl_beta": None},
    )
    sigmas, noisy, params = case.tensor("sigmas"), case.tensor("sample"), case.params
    source, destination = flow_levels(sigmas, torch.tensor([params["step_index"]]))
    level = growing_noise_level(source.sigma, sigmas[1], params["eta"])

    def transition(velocity: torch.Tensor) -> Transition:
        return flow_transition(velocity, noisy, source, destination, level)

    velocity = case.tensor("velocity").requires_grad_()
    old, new, reference = (transition(v) for v in (case.tensor("velocity_old"), velocity, case.tensor("velocity_ref")))
    drawn = old.sample(case.tensor("noise"))
    log_ratio = new.log_prob(drawn) - old.log_prob(drawn)
    normalised = normalised_log_ratio(log_ratio, new.mean, old.mean, new.std)
    divergence = gaussian_kl(new.mean, reference.mean, new.std)
    dt = destination.sigma - source.sigma
    batch = transition_batch(advantage=case.tensor("advantages"), extent=-dt.expand(len(noisy)))
    config = PolicyGradientConfig(clip_range=params["clip_range"])
    penalised = replace(config, kl_beta=params["kl_beta"], kl_form="gaussian")

    def evaluated(ratio: torch.Tensor, per_time: bool) -> tuple[LossOutput, torch.Tensor]:
        """The loss without the penalty, and the gradient of the loss with it."""
        terms = Terms(torch.stack([ratio, divergence], dim=1))
        whole = PolicyObjective(penalised, per_time)(terms, batch)
        return PolicyObjective(config, per_time)(terms, batch), gradient(whole.loss, velocity)

    plain, plain_gradient = evaluated(log_ratio, per_time=False)
    scaled, scaled_gradient = evaluated(normalised, per_time=True)
    return {
        "prev_sample": drawn,
        "pred_x0": noisy - source.sigma * case.tensor("velocity_old"),
        "log_prob_old": old.log_prob(drawn),
        "log_prob": new.log_prob(drawn),
        "noise_scale": new.std[0],
        "dt": dt[0],
        "ratio_plain": plain.metrics["ratio"],
        "policy_loss_plain": plain.loss,
        "ratio_rationorm": scaled.metrics["ratio"],
        "policy_loss_rationorm": scaled.loss,
        "kl_loss": divergence.mean(),
        "grad_plain_plus_kl_wrt_velocity": plain_gradient,
        "grad_rationorm_plus_kl_wrt_velocity": scaled_gradient,
    }
