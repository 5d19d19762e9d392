"""One preference step with the reference in the same network: size conditioning, noising, adapters off, loss, gradient.

The files' networks are linear in a handful of numbers; adapters, reference, strategy and everything else are real.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from diffalign.batch import Condition, ImageBatch
from diffalign.diffusion.process import DiscreteProcess, FlowProcess, NoiseProcess
from diffalign.diffusion.timesteps import few_step_timesteps, indices_at
from diffalign.policies.base import Policy
from diffalign.policies.unet import time_ids
from diffalign.references import AdaptersOff
from diffalign.strategies.base import Context
from diffalign.strategies.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from diffalign.strategies.pair_kernel import noised_at
from tests.factories import ToyBank, ToyLayer, ToyPolicy
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.scripted import SCHEDULE, discrete_process, evaluate

NETWORK = {"base_params", "adapter_delta"}


class LinearLayer(ToyLayer):
    """``q0 x + q1 t/1000 + q2 mean(text) x + q3 mean(pooled) + q4 m x``, ``m = sum_j (j + 1) time_ids[j] / 1e4``."""

    def forward(self, latents: Tensor, times: Tensor, condition: Condition) -> Tensor:  # type: ignore[override]
        named, q = condition.tensors, self.q
        text, pooled = named["prompt_embeds"].mean(dim=(1, 2)), named["pooled_prompt_embeds"].mean(dim=1)
        factor, offset = q[0] + q[2] * text, q[1] * times + q[3] * pooled
        if "time_ids" in named:
            ids = named["time_ids"].to(latents.dtype)
            factor = factor + q[4] * (ids * torch.arange(1, 7)).sum(dim=1) / 1e4
        return factor[:, None, None, None] * latents + offset[:, None, None, None]


class LinearPolicy(ToyPolicy):
    """The case's network with its adapter."""

    def __init__(self, process: NoiseProcess, case: GoldenCase) -> None:
        Policy.__init__(self, LinearLayer(case.tensor("base_params")), process)
        self.adapters = ToyBank(self.module)
        self.adapters.add("default")
        self.adapters.load_state_dict("default", {".delta": case.tensor("adapter_delta")})

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        return self.adapters.guard(self.module(latents, timesteps.to(latents.dtype) / 1000, condition))


def run(case: GoldenCase) -> dict[str, object]:
    return _flow(case) if "u" in case.inputs else _sdxl(case)


def _sdxl(case: GoldenCase) -> dict[str, object]:
    inputs = {"latents", "noise_first_half", "timesteps_sampled", "original_sizes", "crop_top_lefts"}
    case.known(
        {*inputs, *NETWORK, "prompt_embeds", "pooled_prompt_embeds"},
        {
            **SCHEDULE,
            "prediction_type": {"epsilon", "v_prediction"},
            "beta_dpo": None,
            "resolution": None,
            "is_turbo": {True, False},
        },
    )
    process: DiscreteProcess = discrete_process(case.params)
    timesteps, side = case.integers("timesteps_sampled"), case.params["resolution"]
    if case.params["is_turbo"]:
        timesteps = few_step_timesteps(timesteps, process.num_train_timesteps)
    ids = time_ids(case.tensor("original_sizes"), case.tensor("crop_top_lefts"), (side, side), rows=len(timesteps))
    text = {"prompt_embeds": case.tensor("prompt_embeds"), "pooled_prompt_embeds": case.tensor("pooled_prompt_embeds")}
    shared = Condition({**text, "time_ids": ids})
    results, accuracy = _step(case, process, timesteps, (shared, shared), case.params["beta_dpo"])
    repeated = {"timesteps_used": timesteps.repeat(2), "time_ids": torch.cat([ids, ids]), "implicit_acc": accuracy}
    return {**results, **repeated}


def _flow(case: GoldenCase) -> dict[str, object]:
    case.known(
        {"latents", "noise_first_half", "u", "prompt_embeds_2B", "pooled_2B", *NETWORK},
        {"beta": None, "shift": None, "num_train_timesteps": None},
    )
    process = FlowProcess(case.params["shift"], case.params["num_train_timesteps"])
    timesteps = process.timestep_at(indices_at(case.tensor("u"), 0, process.num_train_timesteps))
    halves = zip(case.tensor("prompt_embeds_2B").chunk(2), case.tensor("pooled_2B").chunk(2), strict=True)
    conditions = tuple(Condition({"prompt_embeds": text, "pooled_prompt_embeds": pooled}) for text, pooled in halves)
    results, _ = _step(case, process, timesteps, conditions, case.params["beta"])
    both = timesteps.repeat(2)
    return {**results, "timesteps": both, "sigmas": process.level(both).sigma}


def _step(
    case: GoldenCase, process: NoiseProcess, timesteps: Tensor, conditions: tuple[Condition, ...], beta: float
) -> tuple[dict[str, object], Tensor]:
    policy = LinearPolicy(process, case)
    reference = AdaptersOff(policy)
    ctx = Context(policy, reference)
    batch = ImageBatch(
        ids=[str(row) for row in range(len(timesteps))],
        seeds=torch.arange(len(timesteps)),
        latents=case.tensor("latents"),
        conditions=conditions,
    )
    noised = noised_at(ctx, batch, timesteps, case.tensor("noise_first_half").repeat(2, 1, 1, 1))
    output, _ = evaluate(DiffusionDPO(DiffusionDPOConfig(beta=beta)), ctx, batch, noised)
    (delta,) = policy.adapters.parameters()
    policy.adapters.assert_ready_for_backward()
    output.loss.backward()
    at = noised.latents, noised.timesteps, noised.condition
    assert isinstance(delta, nn.Parameter)
    results: dict[str, object] = {
        "noisy_latents": noised.latents,
        "target": noised.target,
        "policy_pred": policy.predict(*at),
        "ref_pred": reference.evaluate(lambda frozen: frozen.predict(*at)),
        "inside_term": output.metrics["logit"],
        "loss": output.loss,
        "grad_adapter_delta": delta.grad,
    }
    return results, output.metrics["implicit_accuracy"].mean()
