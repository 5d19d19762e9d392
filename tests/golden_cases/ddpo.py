"""DDPO: step, log-probability, clipped loss and gradient; per-prompt statistics."""

from __future__ import annotations

from typing import Any

from torch.autograd import grad

from diffalign.diffusion.sde import ddim_transition, noisy_destinations
from diffalign.strategies.advantages import PromptStatistics
from diffalign.strategies.policy_gradient import ClippedObjective
from tests.golden_cases.analytic import SCHEDULER_PARAMS, scheduler_process
from tests.golden_cases.base import GoldenCase, compare
from tests.golden_cases.on_policy import ROLLOUT, tracked

SCHEDULER = ("beta_start", "beta_end", "beta_schedule", "set_alpha_to_one", "steps_offset", "clip_sample")


def run(case: GoldenCase) -> dict[str, Any]:
    if "updates" in case.inputs:
        return _tracker(case)
    return _step(case)


def _tracker(case: GoldenCase) -> dict[str, Any]:
    case.known({"updates": ROLLOUT}, {"buffer_size": None, "min_count": None, "eps": None})
    tracker = PromptStatistics(case.params["buffer_size"], case.params["min_count"], case.params["eps"])
    return {"advantages_per_update": [row.tolist() for row in tracked(case.inputs["updates"], tracker, case.dtype)]}


def _step(case: GoldenCase) -> dict[str, Any]:
    latents = {"sample", "model_output_old", "model_output", "noise", "advantages"}
    names = {"alphas_cumprod_t", "alphas_cumprod_prev", "timestep", "prev_timestep"} | latents
    case.known(
        names,
        {
            "eta": None,
            "prediction_type": {"epsilon", "v_prediction"},
            "num_inference_steps": None,
            "clip_range": None,
            "adv_clip_max": None,
            "scheduler": {name: SCHEDULER_PARAMS[name] for name in SCHEDULER},
        },
    )
    params = case.params
    process = scheduler_process({**params["scheduler"], "prediction_type": params["prediction_type"]})
    timesteps = case.integers("timestep")
    reached = noisy_destinations(timesteps, process.num_train_timesteps, params["num_inference_steps"])
    if reached.tolist() != case.inputs["prev_timestep"]:
        raise ValueError(f"steps lead to {reached.tolist()}, not to {case.inputs['prev_timestep']}")
    levels = process.level(timesteps), process.level(reached)
    for level, name in zip(levels, ("alphas_cumprod_t", "alphas_cumprod_prev"), strict=True):
        compare(level.alpha.square(), case.inputs[name], case.tolerance, name)
    noisy, renewed = case.tensor("sample"), case.tensor("model_output").requires_grad_()
    old = ddim_transition(process, case.tensor("model_output_old"), noisy, *levels, params["eta"])
    drawn = old.sample(case.tensor("noise"))
    new = ddim_transition(process, renewed, noisy, *levels, params["eta"]).log_prob(drawn)
    objective = ClippedObjective(params["clip_range"], params["adv_clip_max"])
    output = objective((new - old.log_prob(drawn))[:, None], case.tensor("advantages"))
    return {
        "prev_sample": drawn,
        "log_prob_old": old.log_prob(drawn),
        "log_prob": new,
        "ratio": output.metrics["ratio"],
        "approx_kl": output.metrics["approximate_kl"].mean(),
        "loss": output.loss,
        "grad_loss_wrt_model_output": grad(output.loss, renewed)[0],
    }
