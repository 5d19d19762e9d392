"""AlignProp: the differentiable sampler and gradients of the reward for several truncations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from diffalign.batch import Condition
from diffalign.diffusion.differentiable import sample_with_gradient
from diffalign.diffusion.guidance import guided
from diffalign.diffusion.level import Grid, Level
from diffalign.strategies.alignprop import AlignPropConfig, live_steps
from tests.golden_cases.analytic import scheduler_process
from tests.golden_cases.base import GoldenCase

NETWORK = "eps = tanh(einsum('cd,ndhw->nchw', w, x) + b[c]*mean(embeds[n]))"
REWARD = "r = sum(sin(x0) * reward_weight)"
LOSS = "mean(10 - r)"


def run(case: GoldenCase) -> dict[str, Any]:
    weights = {"latents", "w", "b", "prompt_embeds", "negative_prompt_embeds", "reward_weight", "step_noises"}
    case.known(
        weights | {"timesteps", "alphas_cumprod", "alphas_cumprod_prev"},
        {
            "num_inference_steps": None,
            "guidance_scale": None,
            "eta": None,
            "toy_unet": {NETWORK},
            "toy_reward": {REWARD},
            "loss": {LOSS},
        },
    )
    steps = case.params["num_inference_steps"]
    if len(case.inputs["timesteps"]) != steps:
        raise ValueError(f"{len(case.inputs['timesteps'])} timesteps for {steps} steps")
    truncations = [record["backprop_timestep"] for record in case.expected.get("gradients", [])]
    records = []
    for k in truncations:
        final, rewards, loss, parameters = _trajectory(case, k)
        grad_w, grad_b = grad(loss, parameters)
        records.append({"backprop_timestep": k, "grad_w": grad_w.tolist(), "grad_b": grad_b.tolist()})
    final, rewards, loss, _ = _trajectory(case, steps - 1)
    return {"final_latents": final, "rewards": rewards, "loss": loss, "gradients": records}


def _trajectory(case: GoldenCase, k: int) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    parameters = [case.tensor(name).requires_grad_() for name in ("w", "b")]

    def denoiser(latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        said = condition.tensors["prompt_embeds"].flatten(1).mean(1)
        bias = parameters[1][None, :] * said[:, None]
        return torch.tanh(torch.einsum("cd,ndhw->nchw", parameters[0], latents) + bias[:, :, None, None])

    captions, null = (
        Condition({"prompt_embeds": case.tensor(name)}) for name in ("prompt_embeds", "negative_prompt_embeds")
    )
    levels = [
        Level(square.sqrt(), (1 - square).sqrt())
        for square in (case.tensor("alphas_cumprod"), case.tensor("alphas_cumprod_prev"))
    ]
    noises, params = case.tensor("step_noises"), case.params
    final = sample_with_gradient(
        guided(denoiser, captions, null, params["guidance_scale"]),
        scheduler_process({"clip_sample": False}),
        case.tensor("latents"),
        Grid(case.integers("timesteps"), *levels),
        live_steps([k] * params["num_inference_steps"]),
        eta=params["eta"],
        step_noise=lambda move: noises[move],
    )
    rewards = (final.sin() * case.tensor("reward_weight")).flatten(1).sum(1)
    config = AlignPropConfig(loss_form="linear", reward_target=10.0, loss_scale=1.0)
    return final, rewards, config.objective(rewards[:, None], len(rewards)).loss, parameters
