"""The table of methods. A strategy file registers its class; nothing else knows the names."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TypeVar

from diffalign.errors import UserError, unknown
from diffalign.strategies.base import Strategy

_PACKAGES = ("diffalign.strategies", "diffalign.text.strategies")
_METHODS: dict[str, Method] = {}
S = TypeVar("S", bound=type[Strategy])


@dataclass(frozen=True)
class Method:
    """A registered method.

    Args:
        name: what ``--method`` takes.
        summary: one line.
        paper: title and arXiv number, or where it was published.
        repository: official code, empty when there is none.
        family: place in the taxonomy, for example "offline preference".
        strategy: the class.
    """

    name: str
    summary: str
    paper: str
    repository: str
    family: str
    strategy: type[Strategy]


def register(
    name: str, *, summary: str, paper: str, repository: str = "", family: str = "offline preference"
) -> Callable[[S], S]:
    """Class decorator that enters a strategy in the table under ``name``."""

    def enter(strategy: S) -> S:
        known = _METHODS.get(name)
        if known is not None and known.strategy.__qualname__ != strategy.__qualname__:
            raise ValueError(f"two strategies claim the name {name!r}: {known.strategy} and {strategy}")
        _METHODS[name] = Method(name, summary, paper, repository, family, strategy)
        return strategy

    return enter


@cache
def _discover() -> None:
    for package_name in _PACKAGES:
        package = importlib.import_module(package_name)
        for module in pkgutil.iter_modules(package.__path__):
            importlib.import_module(f"{package_name}.{module.name}")
    for entry in entry_points(group="diffalign.strategies"):
        entry.load()


def load_method_file(path: Path) -> None:
    """Import a user's Python file so that the strategies in it register themselves.

    Raises:
        UserError: if the file does not exist.
    """
    if not path.is_file():
        raise UserError(f"no method file at {path}")
    name = f"diffalign_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)


def list_methods(modality: str | None = None) -> list[Method]:
    """Return all methods in alphabetical order, or those of one modality ("image" or "text")."""
    _discover()
    found = [m for m in _METHODS.values() if modality is None or m.strategy.spec.modality == modality]
    return sorted(found, key=lambda method: method.name)


def get_method(name: str) -> Method:
    """Look a method up.

    Raises:
        UserError: if the name is unknown; the nearest known name is offered.
    """
    _discover()
    if name not in _METHODS:
        raise unknown("method", name, _METHODS)
    return _METHODS[name]
