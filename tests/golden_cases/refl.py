"""ReFL: clean latents predicted in one jump, the hinge on their reward, and its gradient."""

from __future__ import annotations

from typing import Any

from torch.autograd import grad

from diffalign.diffusion.level import Level
from diffalign.strategies.base import Terms
from diffalign.strategies.refl import ReFL, ReFLConfig
from tests.golden_cases.analytic import scheduler_process
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.scripted import scripted_batch

REWARD = "r = sum(pred_x0 * reward_weight)"


def run(case: GoldenCase) -> dict[str, Any]:
    case.known(
        {"latents", "eps_pred", "reward_weight", "alpha_cumprod_t", "timestep"},
        {"mid_timestep_index": None, "num_inference_steps": None, "grad_scale": None, "toy_reward": {REWARD}},
    )
    noisy, prediction = case.tensor("latents"), case.tensor("eps_pred").requires_grad_()
    square = case.tensor("alpha_cumprod_t").reshape(1)
    x0 = scheduler_process({}).to_x0(prediction, noisy, Level(square.sqrt(), (1 - square).sqrt()))
    rewards = (x0 * case.tensor("reward_weight")).flatten(1).sum(1)
    method = ReFL(ReFLConfig(loss_scale=case.params["grad_scale"]))
    loss = method.loss(Terms(rewards[:, None]), {}, scripted_batch(noisy, images=1)).loss
    return {"pred_x0": x0, "rewards": rewards, "loss": loss, "grad_loss_wrt_eps": grad(loss, prediction)[0]}
