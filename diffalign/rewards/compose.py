"""Several rewards as one: ``pickscore:1.0,hpsv2:5.0,clip@folder:0.01``, or the same as a list in YAML.

An entry is ``NAME[@SOURCE][:WEIGHT]``. YAML (or Python) says more::

    - {name: pickscore, weight: 1.0, reference: 21.0}   # log-sigmoid of the distance to a reference level
    - {name: hpsv2, weight: 5.0, normalise: true}       # running mean and variance taken out
    - {name: image_reward, top: 2.0}                    # damped where two looks at an image disagree
    - {name: unified_reward, win_rate: true}            # share of duels won against the images of its caption
    - {name: clip, source: folder, weight: 0.01}

``pareto(pickscore,clip)`` is not a sum but the rank by fronts, which knows no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from diffalign.errors import UserError, unknown
from diffalign.records import read_yaml
from diffalign.rewards.base import Reward
from diffalign.rewards.combine import LogSigmoid, Normalised, ParetoRank, UncertaintyWeighted, WeightedSum, WinRate
from diffalign.rewards.loading import load_reward

_PYTHON = "(python "
"""How the source of a reward begins that was given as a Python object."""


def python_source(given: Any) -> str:
    """Return what stands in place of a source for a Python object: ``(python MODULE.NAME)``."""
    given = getattr(given, "function", given)
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{_PYTHON}{named.__module__}.{named.__qualname__})"


@dataclass(frozen=True)
class RewardSpec:
    """One entry of a composition.

    Args:
        name: the scorer, or a PickScore-like CLIP model by bundled name, folder or hub name.
        weight: factor in the sum.
        source: other weights than the scorer's official ones.
        normalise: take the running mean and standard deviation of its scores out; without gradient.
        reference: apply ``log sigmoid(score - reference)``; for scores on a preference-logit scale.
        top: score from which there is nothing more to gain; what lies below is damped by the disagreement of two looks.
        win_rate: take the share of duels won against the other images of the caption in the batch.
    """

    name: str
    weight: float = 1.0
    source: str | None = None
    normalise: bool = False
    reference: float | None = None
    top: float | None = None
    win_rate: bool = False

    def __post_init__(self) -> None:
        changes = {
            "normalise": self.normalise,
            "reference": self.reference is not None,
            "top": self.top is not None,
            "win_rate": self.win_rate,
        }
        given = [name for name, is_given in changes.items() if is_given]
        if len(given) > 1:
            raise UserError(f"reward {self.name!r}: give one of {' and '.join(map(repr, given))}, not both")

    @property
    def is_object(self) -> bool:
        """Whether it was given as a Python object, which no text can bring back."""
        return self.source is not None and self.source.startswith(_PYTHON)

    @property
    def label(self) -> str:
        """What reports call this entry."""
        return self.name if self.source is None or self.is_object else f"{self.name}@{self.source}"


def parse_rewards(text: str | Sequence[Any]) -> list[RewardSpec]:
    """Read a composition.

    Args:
        text: ``NAME[@SOURCE][:WEIGHT]`` separated by commas, the path of a YAML file, or the list that such a file
            holds (strings and mappings mixed).

    Raises:
        UserError: for an empty composition, an entry twice, an unknown key or a weight that is not a number.
    """
    if isinstance(text, str) and text.endswith((".yaml", ".yml")):
        text = _read_file(Path(text))
    entries = [part.strip() for part in text.split(",")] if isinstance(text, str) else list(text)
    specs = [_entry(entry) for entry in entries if entry]
    if not specs:
        raise UserError(f"no rewards in {text!r}; write for example 'pickscore:1.0,hpsv2:5.0'")
    labels = [spec.label for spec in specs]
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        raise UserError(f"rewards given twice: {', '.join(twice)}")
    return specs


def _read_file(path: Path) -> list[Any]:
    content = read_yaml(path)
    content = content.get("rewards") if isinstance(content, Mapping) else content
    if not isinstance(content, list):
        raise UserError(f"{path}: expected a list of rewards, or the key 'rewards' with one")
    return content


def _entry(entry: Any) -> RewardSpec:
    if isinstance(entry, Mapping):
        known = [field.name for field in fields(RewardSpec)]
        for key in entry:
            if key not in known:
                raise unknown("key of a reward", str(key), known)
        if "name" not in entry:
            raise UserError(f"a reward without a name: {dict(entry)}")
        name = str(entry["name"])
        numbers = {"weight": entry.get("weight", 1.0)}
        numbers |= {key: entry[key] for key in ("reference", "top") if entry.get(key) is not None}
        return RewardSpec(**{**entry, **{key: _number(value, key, name) for key, value in numbers.items()}})
    name, colon, weight = str(entry).rpartition(":")
    # A colon before a path belongs to the source (C:\models), not to a weight; so does that of a host and its port.
    if not colon or "/" in weight or "\\" in weight or re.search(r"://[^/]*$", name):
        name, weight = str(entry), "1.0"
    name, _, source = name.partition("@")
    if not name:
        raise UserError(f"a reward without a name: {entry!r}")
    return RewardSpec(name, _number(weight, "weight", name), source or None)


def _number(value: Any, what: str, name: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as problem:
        raise UserError(f"the {what} of reward {name!r} is {value!r}; expected a number") from problem


def load_parts(
    specs: Sequence[RewardSpec],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    given: Mapping[str, Reward] | None = None,
) -> dict[str, Reward]:
    """Load the rewards of a composition one by one, unweighted and with their transformation: label -> reward.

    Args:
        specs: the composition.
        device, dtype: where and how networks run; see :func:`diffalign.rewards.loading.load_reward`.
        given: those that are Python objects, by label; they are used as they are.

    Raises:
        UserError: for an unknown reward, or a Python object that was not given.
    """
    parts: dict[str, Reward] = {}
    for spec in specs:
        reward = _given(spec, given or {}) if spec.is_object else load_reward(spec.label, device, dtype)
        if spec.normalise:
            reward = Normalised(reward)
        if spec.reference is not None:
            reward = LogSigmoid(reward, spec.reference)
        if spec.top is not None:
            reward = UncertaintyWeighted(reward, spec.top)
        if spec.win_rate:
            reward = WinRate(reward)
        parts[spec.label] = reward
    return parts


def _given(spec: RewardSpec, given: Mapping[str, Reward]) -> Reward:
    if spec.label not in given:
        raise UserError(
            f"the reward {spec.name!r} was a Python object, {spec.source}, which only Python can give: "
            f"diffalign.train(..., rewards={{{spec.name!r}: ({spec.name}, {spec.weight})}})"
        )
    return given[spec.label]


def compose(
    rewards: str | Sequence[Any], device: str | torch.device = "cpu", dtype: torch.dtype | None = None
) -> Reward:
    """Load a composition as one reward.

    Example::

        reward = compose("tiny-pickscore:1.0,incompressibility:0.1")

    Args:
        rewards: see :func:`parse_rewards`; or such a text in ``pareto(...)``.
        device, dtype: where and how networks run; see :func:`diffalign.rewards.loading.load_reward`.

    Returns:
        the reward itself where there is one of weight 1, else their weighted sum, or their rank by fronts.

    Raises:
        UserError: for a mistake in the text or an unknown reward.
    """
    ranked = re.fullmatch(r"pareto\((.+)\)", rewards.strip()) if isinstance(rewards, str) else None
    specs = parse_rewards(ranked[1] if ranked else rewards)
    if ranked and (weighted := [spec.label for spec in specs if spec.weight != 1.0]):
        raise UserError(f"fronts know no weights: leave that of {weighted[0]!r} out of pareto(...)")
    parts = load_parts(specs, device, dtype)
    if ranked:
        return ParetoRank(parts)
    if len(specs) == 1 and specs[0].weight == 1.0:
        return parts[specs[0].label]
    return WeightedSum(parts, {spec.label: spec.weight for spec in specs})
