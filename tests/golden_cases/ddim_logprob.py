"""The DDIM step as a Gaussian policy, per-prompt statistics, the clipped loss."""

from __future__ import annotations

from typing import Any

from torch.autograd import grad

from diffalign.diffusion.sde import ddim_transition, noisy_destinations
from diffalign.strategies.advantages import PromptStatistics
from diffalign.strategies.policy_gradient import ClippedObjective
from tests.golden_cases.analytic import SCHEDULER_PARAMS, scheduler_process
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.on_policy import ROLLOUT, tracked


def run(case: GoldenCase) -> dict[str, Any]:
    if "timestep" in case.inputs:
        return _step(case)
    if "batches" in case.inputs:
        return _tracker(case)
    if "log_prob" in case.inputs:
        return _clipped(case)
    raise ValueError(f"no product function for inputs {sorted(case.inputs)}")


def _step(case: GoldenCase) -> dict[str, Any]:
    inputs = {"sample", "model_output", "timestep", "noise", "model_output_new"}
    case.known(inputs, {"num_inference_steps": None, "eta": None, **SCHEDULER_PARAMS})
    process, eta, timesteps = scheduler_process(case.params), case.params["eta"], case.integers("timestep")
    destinations = noisy_destinations(timesteps, process.num_train_timesteps, case.params["num_inference_steps"])
    levels = process.level(timesteps), process.level(destinations)
    noisy, renewed = case.tensor("sample"), case.tensor("model_output_new").requires_grad_()
    old = ddim_transition(process, case.tensor("model_output"), noisy, *levels, eta)
    drawn = old.sample(case.tensor("noise"))
    new = ddim_transition(process, renewed, noisy, *levels, eta).log_prob(drawn)
    return {
        "prev_timestep": destinations,
        "alpha_cumprod_t": levels[0].alpha.square(),
        "alpha_cumprod_prev": levels[1].alpha.square(),
        "std": old.std,
        "prev_sample": drawn,
        "log_prob": old.log_prob(drawn),
        "log_prob_new": new,
        "grad_sum_log_prob_new_wrt_model_output_new": grad(new.sum(), renewed)[0],
    }


def _tracker(case: GoldenCase) -> dict[str, Any]:
    case.known({"batches": ROLLOUT}, {"buffer_size": None, "min_count": None})
    tracker = PromptStatistics(case.params["buffer_size"], case.params["min_count"])
    advantages = tracked(case.inputs["batches"], tracker, case.dtype)
    return {"advantages": [row.tolist() for row in advantages], "stats": tracker.summary()}


def _clipped(case: GoldenCase) -> dict[str, Any]:
    case.known({"log_prob", "log_prob_old", "advantages"}, {"clip_range": None, "adv_clip_max": None})
    objective = ClippedObjective(case.params["clip_range"], case.params["adv_clip_max"])
    log_prob = case.tensor("log_prob").requires_grad_()
    output = objective((log_prob - case.tensor("log_prob_old"))[:, None], case.tensor("advantages"))
    return {
        "loss": output.loss,
        "ratio": output.metrics["ratio"],
        "grad_log_prob": grad(output.loss, log_prob)[0],
    }
