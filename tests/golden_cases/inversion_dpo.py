"""Inversion-DPO along the reference's path, with either sign."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.batch import Condition
from diffalign.diffusion.guidance import guided
from diffalign.diffusion.inversion import climb_path
from diffalign.diffusion.ladders import sampling_ladder
from diffalign.strategies.base import Context
from diffalign.strategies.inversion_dpo import InversionDPO, InversionDPOConfig
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.scripted import (
    SCHEDULE,
    ScriptedPolicy,
    ScriptedReference,
    discrete_process,
    evaluate,
    scripted_batch,
)

PARAMS = {
    **SCHEDULE,
    "num_inversion_steps": None,
    "guidance_scale": None,
    "beta_dpo": None,
    "steps_offset": None,
    "set_alpha_to_one": {True, False},
}


def analytic(params: Tensor) -> Callable[[Tensor, Tensor, Condition], Tensor]:
    """The network of the cases: ``p0 x + p1 t/1000 + p2 x t/1000 + p3 sin x + p4 c x``."""

    def predict(latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        shape = (-1, *[1] * (latents.dim() - 1))
        time, text = (timesteps.to(latents) / 1000).reshape(shape), condition.tensors["context"].reshape(shape)
        along = params[0] + params[2] * time + params[4] * text
        return along * latents + params[1] * time + params[3] * latents.sin()

    return predict


def run(case: GoldenCase) -> dict[str, object]:
    case.known({"x_win", "x_lose", "policy_params", "ref_params", "context"}, PARAMS)
    official = InversionDPOConfig(
        beta=case.params["beta_dpo"],
        num_inversion_steps=case.params["num_inversion_steps"],
        inversion_guidance_scale=case.params["guidance_scale"],
        path="reference",
        sign=1,
        warm_start_steps=0,
    )
    params = case.tensor("policy_params").requires_grad_()
    context = case.tensor("context")
    process = discrete_process(case.params)
    policy, reference = (
        ScriptedPolicy(analytic(p), process, Condition({"context": context[:1]}))
        for p in (params, case.tensor("ref_params"))
    )
    ctx = Context(policy, ScriptedReference(reference))  # type: ignore[arg-type]
    latents = torch.cat([case.tensor("x_win"), case.tensor("x_lose")])
    batch = scripted_batch(latents).with_conditions((Condition({"context": context[1:]}),) * 2)

    strategy, opposite = (InversionDPO(config) for config in (official, replace(official, sign=-1)))
    draws = strategy.draw(ctx, batch)
    output, _ = evaluate(strategy, ctx, batch, draws)
    other, _ = evaluate(opposite, ctx, batch, draws)
    (gradient,) = torch.autograd.grad(output.loss, params)
    moves = official.num_inversion_steps
    chosen, rejected = output.metrics["winner_margin"], -output.metrics["loser_margin"]
    led = guided(reference.predict, batch.condition, reference.null_condition(2), official.inversion_guidance_scale)
    after = torch.stack(climb_path(led, process, latents, sampling_ladder(process, 2, moves)).latents[1:])
    if not torch.equal(after[:-1].flatten(0, 1), draws.path.latents[2:]):
        raise ValueError("the strategy trains on another path")
    return {
        "timesteps_ascending": draws.path.timesteps[::2],
        "ref_trajectory_win": after[:, :1],
        "ref_trajectory_lose": after[:, 1:],
        "weighted_sum_win": moves * chosen[0],
        "weighted_sum_lose": moves * rejected[0],
        "diff": (chosen - rejected)[0],
        "inside_term": output.metrics["logit"][0],
        "loss": output.loss,
        "grad_policy_params": gradient,
        "inside_term_opposite_sign": other.metrics["logit"][0],
        "loss_opposite_sign": other.loss,
    }
