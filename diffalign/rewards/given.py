"""Rewards as Python gives them: by name, as objects, as functions; and what a configuration says of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from diffalign.errors import UserError
from diffalign.rewards.base import Reward
from diffalign.rewards.combine import WeightedSum
from diffalign.rewards.compose import RewardSpec, load_parts, parse_rewards, python_source
from diffalign.rewards.function import FunctionReward

Rewards = str | Reward | Callable[..., Any] | Mapping[str, Any]
"""``"pickscore:0.05,clip@folder:0.01"``; a :class:`Reward`, or a function of (images, prompts); or a mapping name ->
weight, reward, function, or (reward or function, weight)."""


def read_rewards(rewards: Rewards) -> tuple[list[RewardSpec], dict[str, Reward]]:
    """Read rewards in any of the forms of :data:`Rewards`.

    Returns:
        the composition, and the objects in it by their label.

    Raises:
        UserError: for no reward at all, or something that is none.
    """
    if isinstance(rewards, str):
        return parse_rewards(rewards), {}
    if isinstance(rewards, WeightedSum):
        rewards = {name: (part, rewards.weights[name]) for name, part in rewards.parts.items()}
    if not isinstance(rewards, Mapping):
        name = _name(rewards)
        rewards = {name: _object(name, rewards)}
    if not rewards:
        raise UserError("no rewards: give for example {'pickscore': 1.0}")
    specs, objects = [], {}
    for name, value in rewards.items():
        given, weight = value if isinstance(value, tuple) and len(value) == 2 else (value, 1.0)
        if _is_number(given):
            specs += parse_rewards([f"{name}:{float(given)}"])
            continue
        if not _is_number(weight):
            raise UserError(f"the weight of reward {name!r} is {weight!r}; expected a number")
        objects[name] = _object(name, given)
        specs.append(RewardSpec(name, float(weight), python_source(given)))
    return specs, objects


def described(specs: Sequence[RewardSpec]) -> str:
    """Return the text that configurations hold, which ``parse_rewards`` reads again.

    Raises:
        UserError: for a name that such a text cannot hold.
    """
    for spec in specs:
        if spec.is_object and re.search(r"[,:@]", spec.name):
            raise UserError(f"the reward {spec.name!r} needs a name without commas, colons and @: {{'mine': reward}}")
    return ",".join(f"{spec.name}{'@' if spec.source else ''}{spec.source or ''}:{spec.weight}" for spec in specs)


def weighted(rewards: Rewards, device: torch.device | str = "cpu") -> WeightedSum:
    """Load what is given by name and put weights to it.

    Args:
        rewards: see :data:`Rewards`.
        device: where networks of rewards given by name run.

    Raises:
        UserError: for no reward at all, or an unknown one.
    """
    specs, objects = read_rewards(rewards)
    return WeightedSum(load_parts(specs, device, given=objects), {spec.label: spec.weight for spec in specs})


def _object(name: str, given: Any) -> Reward:
    if isinstance(given, Reward):
        return given
    if callable(given):
        return FunctionReward(given, name)
    raise UserError(f"the reward {name!r} is a {type(given).__name__}: give a weight, a Reward, or a function")


def _name(given: Any) -> str:
    """Name of a reward that came without one."""
    if isinstance(given, Reward):
        return given.info.name
    name = getattr(given, "__name__", "reward")
    return name if name.isidentifier() else "reward"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
