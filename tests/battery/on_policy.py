"""What the battery knows of on-policy methods: small options, rewards, captions and how updates are taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.policies.base import Policy
from diffalign.references import AdaptersOff
from diffalign.rewards.function import FunctionReward
from diffalign.strategies.base import Context, Strategy, Update
from diffalign.strategies.on_policy import FromRollouts
from diffalign.strategies.registry import get_method, list_methods
from diffalign.training.processes import Processes
from diffalign.training.update import Account, GradientPass

SMALL: dict[str, Any] = {
    "images_per_prompt": 4,
    "rollout_steps": 4,
    "rollout_guidance_scale": 2.0,
    "rollout_batch_size": 5,
    "transitions_per_pass": 7,
}


@dataclass(frozen=True)
class OnPolicy:
    """What the battery expects of a method. Most of it follows from its registration, see :func:`described`.

    Args:
        options: of its config, besides :data:`SMALL`.
        reference: the reference is asked beside every pass with a graph.
        learning_rate: at which a few rollouts on the toy policy raise the reward.
        to_learn: options for that, where the others are too small to learn by.
        pairs: transitions come in pairs, which stay together in a pass.
        coupled: the loss couples all steps of a caption: where they take several passes, all are made twice.
    """

    options: Mapping[str, Any]
    reference: bool
    learning_rate: float = 0.05
    to_learn: Mapping[str, Any] = field(default_factory=dict)
    pairs: bool = False
    coupled: bool = False


SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "d3po": {
        "options": {"updates_per_rollout": 2, "ratio_clip": 0.5, "beta": 5.0, "compare": "sum"},
        "learning_rate": 0.02,
        "pairs": True,
    },
    "ddpo": {"options": {"advantage": "group"}},
    "flow_grpo": {"options": {"detach_unconditional": False}},
    "parrot": {"options": {"identifiers": False}, "to_learn": {"images_per_prompt": 16, "rollout_batch_size": 64}},
    "prdp": {"options": {"beta": 0.1, "step_clip": 0.5}, "learning_rate": 0.02, "coupled": True},
}
"""What does not follow from a method's registration; no other method needs an entry."""
NAMES = [method.name for method in list_methods("image") if issubclass(method.strategy, FromRollouts)]


def described(name: str) -> OnPolicy:
    """Return what is expected of a method: from its registration, and where that does not tell, from `SPECIAL`."""
    strategy, special = get_method(name).strategy, dict(SPECIAL.get(name, {}))
    wide = {"clip_range": 0.2} if hasattr(strategy.Config, "clip_range") else {}
    options = {**SMALL, **wide, **special.pop("options", {})}
    return OnPolicy(options, strategy(strategy.Config(**options)).spec.needs_reference, **special)


def make(name: str, **options: Any) -> Strategy:
    """Make a strategy with its battery options and others."""
    strategy = get_method(name).strategy
    return strategy(strategy.Config(**{**described(name).options, **options}))


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of the pixels."""
    return images.flatten(1).mean(1)


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    """Mean of the first channel."""
    return images[:, 0].flatten(1).mean(1)


REWARDS: Mapping[str, Any] = {"bright": FunctionReward(brightness, "bright"), "red": FunctionReward(redness, "red")}


def context(policy: Policy, rewards: Mapping[str, Any] | None = None, **options: Any) -> Context:
    """A context with rewards, whose reference is the policy with its adapter off."""
    return Context(policy, AdaptersOff(policy), rewards=rewards or REWARDS, folder=Path("nowhere"), **options)


def captions(policy: Policy, count: int = 3, start: int = 0) -> list[ImageBatch]:
    """Captions in micro-batches of two."""
    shape = policy.latent_shape(*policy.default_resolution)
    names = [f"a {chr(ord('a') + index)}" for index in range(count)]
    return [
        ImageBatch(
            ids=[f"caption-{index}" for index in range(first, min(first + 2, count))],
            seeds=torch.arange(first, min(first + 2, count)) + 1000 * start,
            prompts=names[first : first + 2],
            latents=torch.empty(0, *shape),
            conditions=(policy.encode_prompts(names[first : first + 2]),),
        )
        for first in range(0, count, 2)
    ]


def collected(strategy: Strategy, ctx: Context, batches: Sequence[ImageBatch]) -> list[Update]:
    """Open the strategy and roll out once."""
    strategy.build(ctx)
    return list(strategy.collect(ctx, batches))


def gradient(strategy: Strategy, ctx: Context, update: Update, trained: list[torch.nn.Parameter]) -> Account:
    """Run one update through the loop's own gradient pass."""
    for parameter in trained:
        parameter.grad = None
    return GradientPass(strategy, ctx, trained, Processes())(update)


def trained_reward(
    strategy: Strategy, policy: Policy, rollouts: int, rate: float, judge: Callable[..., Tensor]
) -> float:
    """Train for some rollouts; return the mean reward of a later one that nothing was trained on."""
    ctx = context(policy)
    trained = list(policy.adapters.parameters("default"))
    optimizer = torch.optim.Adam(trained, lr=rate)
    strategy.build(ctx)
    for index in range(rollouts):
        for update in strategy.collect(ctx, captions(policy, 4, start=index)):
            gradient(strategy, ctx, update, trained)
            optimizer.step()
            ctx.progress.step += 1
            strategy.after_step(ctx)
    from diffalign.rollouts.rollout import Rollouts

    judged = Rollouts(strategy.config)
    judged.open(context(policy, {"judge": FunctionReward(judge, "judge")}))
    fresh = judged(context(policy, {"judge": FunctionReward(judge, "judge")}), captions(policy, 4, start=10**6))
    return float(fresh.rewards.mean())
