"""Pref-GRPO: win rates and combined advantages; one step with plain and with normalised ratios."""

from __future__ import annotations

from typing import Any

import torch

from diffalign.diffusion.sde import (
    Transition,
    flow_grpo_noise_level,
    flow_transition,
    gaussian_kl,
    normalised_log_ratio,
)
from diffalign.strategies.advantages import combined_advantages
from diffalign.strategies.policy_gradient import ClippedObjective
from diffalign.strategies.pref_grpo import duel_win_rates
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.on_policy import flow_levels, gradient

DECIMALS = 3
"""To which the released code rounds win rates."""


def run(case: GoldenCase) -> dict[str, Any]:
    return _advantages(case) if "pairs" in case.inputs else _step(case)


def _advantages(case: GoldenCase) -> dict[str, Any]:
    case.known(
        {"pairs", "outcomes", "clip_scores"},
        {
            "num_items": None,
            "reward_weights": None,
            "apply_batch_normalisation": {True, False},
            "eps": None,
            "std": {"unbiased (ddof=1)"},
        },
    )
    duels = case.integers("pairs"), case.integers("outcomes"), case.params["num_items"]
    rates = duel_win_rates(*duels, decimals=DECIMALS)
    total, parts = combined_advantages(
        {"win_rate": rates, "clip": case.tensor("clip_scores")},
        case.params["reward_weights"],
        torch.zeros(len(rates), dtype=torch.long),
        renormalise=case.params["apply_batch_normalisation"],
        eps=case.params["eps"],
    )
    return {
        "win_rate": rates,
        "win_rate_unrounded": duel_win_rates(*duels),
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
    level = flow_grpo_noise_level(source.sigma, sigmas[1], params["eta"])

    def transition(velocity: torch.Tensor) -> Transition:
        return flow_transition(velocity, noisy, source, destination, level)

    velocity = case.tensor("velocity").requires_grad_()
    old, new, reference = (transition(v) for v in (case.tensor("velocity_old"), velocity, case.tensor("velocity_ref")))
    drawn, advantages = old.sample(case.tensor("noise")), case.tensor("advantages")
    log_ratio = new.log_prob(drawn) - old.log_prob(drawn)
    normalised = normalised_log_ratio(log_ratio, new.mean, old.mean, new.std)
    objective = ClippedObjective(params["clip_range"])
    dt = (destination.sigma - source.sigma)[0]
    plain = objective(log_ratio[:, None], advantages)
    scaled = objective(normalised[:, None], advantages, weight=1 / dt.abs())
    divergence = gaussian_kl(new.mean, reference.mean, reference.std).mean()
    penalty = params["kl_beta"] * divergence
    return {
        "prev_sample": drawn,
        "pred_x0": noisy - source.sigma * case.tensor("velocity_old"),
        "log_prob_old": old.log_prob(drawn),
        "log_prob": new.log_prob(drawn),
        "noise_scale": new.std[0],
        "dt": dt,
        "ratio_plain": plain.metrics["ratio"],
        "policy_loss_plain": plain.loss,
        "ratio_rationorm": scaled.metrics["ratio"],
        "policy_loss_rationorm": scaled.loss,
        "kl_loss": divergence,
        "grad_plain_plus_kl_wrt_velocity": gradient(plain.loss + penalty, velocity),
        "grad_rationorm_plus_kl_wrt_velocity": gradient(scaled.loss + penalty, velocity),
    }
