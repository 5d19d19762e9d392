"""The table of scorers. A file of this package registers its loader; nothing else knows the names."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points

import torch

from diffalign.errors import UserError, unknown
from diffalign.rewards.base import Reward


@dataclass(frozen=True)
class LoadOptions:
    """What every loader is told.

    Args:
        source: hub name, local folder or checkpoint file; None for the scorer's official weights.
        device: where networks run.
        dtype: how networks run; the final arithmetic is float32 or wider.
    """

    source: str | None = None
    device: str | torch.device = "cpu"
    dtype: torch.dtype = torch.float32


Loader = Callable[[LoadOptions], Reward]


@dataclass(frozen=True)
class Scorer:
    """A registered scorer.

    Args:
        name: what command lines call it.
        summary: one line.
        paper: where it was published; empty where there is no paper.
        load: builds it.
        large: its network has billions of weights.
    """

    name: str
    summary: str
    paper: str
    load: Loader
    large: bool = False

    def usual_dtype(self, device: str | torch.device) -> torch.dtype:
        """Return how its networks run on a device where nobody says otherwise: large ones fit GPUs in bfloat16."""
        return torch.bfloat16 if self.large and torch.device(device).type == "cuda" else torch.float32


_SCORERS: dict[str, Scorer] = {}


def register(name: str, *, summary: str, paper: str = "", large: bool = False) -> Callable[[Loader], Loader]:
    """Decorator that enters a loader in the table under ``name``; other arguments as of :class:`Scorer`."""

    def enter(load: Loader) -> Loader:
        known = _SCORERS.get(name)
        if known is not None and known.load.__module__ != load.__module__:
            raise ValueError(f"two scorers claim the name {name!r}: {known.load.__module__} and {load.__module__}")
        _SCORERS[name] = Scorer(name, summary, paper, load, large)
        return load

    return enter


@cache
def _discover() -> None:
    package = importlib.import_module("diffalign.rewards")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    for entry in entry_points(group="diffalign.rewards"):
        entry.load()


def list_scorers() -> list[Scorer]:
    """Return all scorers in alphabetical order."""
    _discover()
    return sorted(_SCORERS.values(), key=lambda scorer: scorer.name)


def get_scorer(name: str) -> Scorer:
    """Look a scorer up.

    Raises:
        UserError: if the name is unknown; the nearest known name is offered.
    """
    _discover()
    if name not in _SCORERS:
        raise unknown("reward", name, _SCORERS)
    return _SCORERS[name]


def no_source(name: str, options: LoadOptions) -> None:
    """Refuse a source for a scorer that has no weights.

    Raises:
        UserError: if one was given.
    """
    if options.source is not None:
        raise UserError(f"the reward {name!r} has no weights; leave '@{options.source}' out")
