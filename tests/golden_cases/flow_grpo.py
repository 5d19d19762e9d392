"""Flow-GRPO: SDE step, clipped loss, penalty and gradient; group advantages; DanceGRPO's step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from diffalign.diffusion.sde import flow_transition, gaussian_kl, growing_noise_level
from diffalign.strategies.advantages import group_advantages
from diffalign.strategies.base import Terms
from diffalign.strategies.on_policy import PolicyGradientConfig, PolicyObjective
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.on_policy import flow_levels, gradient, transition_batch


def run(case: GoldenCase) -> dict[str, Any]:
    if "prompts" in case.inputs:
        return _advantages(case)
    return _step(case) if "step_index" in case.inputs else _dance(case)


def _advantages(case: GoldenCase) -> dict[str, Any]:
    case.known({"prompts", "rewards"}, {"global_std": {True, False}, "eps": None})
    prompts = case.inputs["prompts"]
    groups = torch.tensor([prompts.index(prompt) for prompt in prompts])
    scope = "batch" if case.params["global_std"] else "group"
    return {"advantages": group_advantages(case.tensor("rewards"), groups, scope, case.params["eps"])}


def _step(case: GoldenCase) -> dict[str, Any]:
    case.known(
        {"sigmas", "step_index", "sample", "velocity_old", "velocity", "velocity_ref", "noise", "advantages"},
        {
            "noise_level": None,
            "clip_range": None,
            "adv_clip_max": None,
            "kl_beta": None,
            "num_inference_steps": None,
            "shift": None,
        },
    )
    sigmas, noisy, params = case.tensor("sigmas"), case.tensor("sample"), case.params
    source, destination = flow_levels(sigmas, case.integers("step_index"))
    level = growing_noise_level(source.sigma, sigmas[1], params["noise_level"])
    velocity = case.tensor("velocity").requires_grad_()
    old, new, reference = (
        flow_transition(v, noisy, source, destination, level)
        for v in (case.tensor("velocity_old"), velocity, case.tensor("velocity_ref"))
    )
    drawn = old.sample(case.tensor("noise"))
    divergence = gaussian_kl(new.mean, reference.mean, new.std)
    terms = Terms(torch.stack([new.log_prob(drawn) - old.log_prob(drawn), divergence], dim=1))
    batch = transition_batch(advantage=case.tensor("advantages"), extent=source.sigma - destination.sigma)
    config = PolicyGradientConfig(clip_range=params["clip_range"], advantage_limit=params["adv_clip_max"])
    policy = PolicyObjective(config)(terms, batch)
    loss = PolicyObjective(replace(config, kl_beta=params["kl_beta"], kl_form="released"))(terms, batch).loss
    return {
        "std_dev_t": level,
        "prev_sample_mean_old": old.mean,
        "prev_sample": drawn,
        "log_prob_old": old.log_prob(drawn),
        "prev_sample_mean": new.mean,
        "log_prob": new.log_prob(drawn),
        "ratio": policy.metrics["ratio"],
        "policy_loss": policy.loss,
        "kl_loss": gaussian_kl(new.mean, reference.mean, level).mean(),
        "kl_per_sample_with_dt": divergence,
        "loss": loss,
        "grad_loss_wrt_velocity": gradient(loss, velocity),
    }


def _dance(case: GoldenCase) -> dict[str, Any]:
    case.known({"sigmas", "sample", "velocity_old", "velocity", "noise"}, {"step_index": None, "eta": None})
    noisy, eta = case.tensor("sample"), case.params["eta"]
    source, destination = flow_levels(case.tensor("sigmas"), torch.tensor([case.params["step_index"]]))
    velocity = case.tensor("velocity").requires_grad_()
    old = flow_transition(case.tensor("velocity_old"), noisy, source, destination, eta)
    drawn = old.sample(case.tensor("noise"))
    log_prob = flow_transition(velocity, noisy, source, destination, eta).log_prob(drawn)
    return {
        "prev_sample": drawn,
        "pred_x0": noisy - source.sigma * case.tensor("velocity_old"),
        "log_prob_old": old.log_prob(drawn),
        "log_prob": log_prob,
        "grad_sum_log_prob_wrt_velocity": gradient(log_prob.sum(), velocity),
    }
