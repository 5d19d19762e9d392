"""What the cases of InPO and SmPO share: an analytic network, inverted by the official grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from diffalign.batch import Condition
from diffalign.diffusion.ladders import official_ladder
from diffalign.strategies.base import Context
from diffalign.strategies.inpo import InPO
from diffalign.strategies.inverted_noise import InvertedNoise
from diffalign.strategies.pair_kernel import DenoisingKernel
from diffalign.strategies.smpo import SmPO
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.scripted import (
    SCHEDULE,
    ScriptedPolicy,
    ScriptedReference,
    discrete_process,
    evaluate,
    scripted_batch,
)

INPUTS = {"x0", "t_star", "policy_params", "ref_params"}
PARAMS = {
    **SCHEDULE,
    "beta_dpo": None,
    "num_inversion_steps": None,
    "clip_sample": {False},
    "set_alpha_to_one": {True, False},
    "steps_offset": None,
    "prediction_type": {"epsilon"},
}


def analytic(params: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The network of the cases: ``p0 x + p1 t/1000 + p2 x t/1000 + p3 sin x``."""

    def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
        time = (timesteps.to(latents) / 1000).reshape(-1, *[1] * (latents.dim() - 1))
        return params[0] * latents + params[1] * time + params[2] * latents * time + params[3] * latents.sin()

    return predict


def run_inverted(
    case: GoldenCase, strategy: InPO | SmPO, fields: Mapping[str, Tensor] | None = None
) -> dict[str, object]:
    """Draw, evaluate and differentiate as the loop does, with the case's timestep and noises for random ones."""
    process = discrete_process(case.params)
    params = case.tensor("policy_params").requires_grad_()
    policy_network, ref_network = analytic(params), analytic(case.tensor("ref_params"))
    calls: list[int] = []
    predictions: list[Tensor] = []

    def predict(latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        calls.append(int(timesteps[0]))
        predictions.append(policy_network(latents, timesteps))
        return predictions[-1]

    policy = ScriptedPolicy(predict, process)
    reference = ScriptedPolicy(lambda latents, timesteps, condition: ref_network(latents, timesteps), process)
    ctx = Context(policy, ScriptedReference(reference))  # type: ignore[arg-type]
    batch = scripted_batch(case.tensor("x0"), fields=fields)
    timesteps = torch.full((batch.size,), int(case.inputs["t_star"]))
    pin(strategy, timesteps, case.tensor("step_noises") if "step_noises" in case.inputs else None)

    draws = strategy.draw(ctx, batch)
    output, _ = evaluate(strategy, ctx, batch, draws)
    (gradient,) = torch.autograd.grad(output.loss, params)
    last = torch.tensor([process.num_train_timesteps - 1])
    grid = official_ladder(process, last, case.params["num_inversion_steps"])
    return {
        "grid_after_set_timesteps": [int(rung.labels[0]) for rung in grid],
        "policy_timestep_calls": calls,
        "inverted_latents": draws.latents,
        "noise_target": draws.target,
        "policy_pred": predictions[-1],
        "ref_pred": ref_network(draws.latents, draws.timesteps),
        "inside_term": output.metrics["logit"],
        "loss": output.loss,
        "grad_policy_params": gradient,
    }


def pin(strategy: InPO | SmPO, timesteps: Tensor, noises: Tensor | None) -> None:
    """Let the strategy's noiser use given timesteps (B,) and, where given, noises (moves, rows, channels, ...)."""
    kernel = strategy._kernel
    assert isinstance(kernel, DenoisingKernel)
    assert isinstance(kernel.noiser, InvertedNoise)
    noiser = replace(kernel.noiser, timesteps=lambda ctx, batch: timesteps)
    if noises is not None:
        noiser = replace(noiser, step_noise=lambda ctx, batch, move: noises[move])
    strategy._kernel = replace(kernel, noiser=noiser)
