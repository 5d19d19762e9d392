"""ReNO: the penalty of the norm, and every iterate of the search on a generator given by a formula."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import grad

from diffalign.inference.noise_judge import Look
from diffalign.inference.noise_search import NoiseSearch, SearchSettings, norm_penalty
from diffalign.rewards.base import Metadata, Reward, RewardInfo
from diffalign.rewards.combine import WeightedSum
from tests.golden_cases.base import GoldenCase

GENERATOR = "image = sigmoid(flatten(latents) @ W) reshaped to (1,3,2,2)"
REWARDS = "loss_HPS = 1 - 10*mean(image*target_hps); loss_IR = 2 - 10*mean(image*target_imagereward)"
OFFSETS = {"HPS": 1.0, "ImageReward": 2.0}
"""Loss of a reward of zero: published numbers are losses ``offset - reward``."""


class Resemblance(Reward):
    """Ten times the mean product with a picture."""

    def __init__(self, name: str, picture: Tensor) -> None:
        self.info = RewardInfo(name, "resemblance", (-torch.inf, torch.inf), differentiable=True)
        self.picture = picture

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        return 10 * (images * self.picture).flatten(1).mean(1)


def run(case: GoldenCase) -> dict[str, Any]:
    case.known(
        {"init_latents", "W", "target_hps", "target_imagereward"},
        {
            "n_iters": None,
            "lr": None,
            "grad_clip": None,
            "reg_weight": None,
            "regularize": {True, False},
            "optimizer": {"adam", "sgd"},
            "nesterov": {True, False},
            "momentum": None,
            "weights": dict.fromkeys(OFFSETS),
            "toy_generator": {GENERATOR},
            "toy_rewards": {REWARDS},
            "adam_eps": None,
        },
    )
    params, start, mixing = case.params, case.tensor("init_latents"), case.tensor("W")
    weights, norm_weight = dict(params["weights"]), params["reg_weight"] if params["regularize"] else 0.0
    targets = {"HPS": case.tensor("target_hps"), "ImageReward": case.tensor("target_imagereward")}
    reward = WeightedSum({name: Resemblance(name, targets[name]) for name in weights}, weights)

    def generate(noise: Tensor, rows: Sequence[int]) -> Tensor:
        return torch.sigmoid(noise.flatten(1) @ mixing).reshape(-1, 3, 2, 2)

    settings = SearchSettings(
        steps=params["n_iters"],
        learning_rate=params["lr"],
        optimizer=params["optimizer"],
        momentum=params["momentum"],
        nesterov=params["nesterov"],
        adam_epsilon=params["adam_eps"],
        max_grad_norm=params["grad_clip"],
        norm_weight=norm_weight,
    )
    looks: list[Look] = []
    (found,) = NoiseSearch(generate, reward, settings)(start, [""], callback=looks.append)
    offset = sum(weight * OFFSETS[name] for name, weight in weights.items())
    leaf = start.requires_grad_()
    penalty = norm_weight * norm_penalty(leaf).sum()
    loss = offset - reward.score(generate(leaf, [0]), [""]).sum()
    return {
        "reward_loss_first": loss,
        "regulariser_first": penalty,
        "grad_regulariser_first": grad(penalty, leaf)[0],
        "grad_reward_first": grad(loss, leaf)[0],
        "latents_before_each_iteration": torch.stack([look.noise for look in looks]),
        "total_reward_loss_each_iteration": [offset - total for total in found.history["total"]],
        "best_iteration": found.iteration,
        "best_total": offset - found.total,
        "initial_total": offset - found.history["total"][0],
    }
