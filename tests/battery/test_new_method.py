"""A method in a file of its own, of which the battery has not heard, is asked every question that all are asked."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import tests.battery.test_battery as battery
import tests.battery.test_learning as learning
import tests.battery.test_on_policy as on_policy
from diffalign.strategies import registry
from tests.battery.methods import PROCESSES
from tests.docs.documents import blocks

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "adding_a_method.md"
ROLLOUTS = """
from dataclasses import dataclass

from diffalign.strategies.advantages import batch_advantages
from diffalign.strategies.on_policy import PolicyGradient, PolicyGradientConfig
from diffalign.strategies.registry import register


@dataclass(frozen=True)
class PlainConfig(PolicyGradientConfig):
    \"\"\"Nothing of its own.\"\"\"


@register("plain_gradient", summary="an example", paper="none", family="on-policy")
class PlainGradient(PolicyGradient):
    Config = PlainConfig

    def advantages(self, rollout):
        return batch_advantages(rollout.rewards)
"""


def questions(module: ModuleType) -> list[Callable[..., None]]:
    """The tests of a module that ask every method."""
    tests = [test for name, test in vars(module).items() if name.startswith("test_")]
    names = sorted(module.NAMES)
    marks = [[mark for mark in getattr(test, "pytestmark", []) if mark.args[:1] == ("name",)] for test in tests]
    return [test for test, found in zip(tests, marks, strict=True) if any(sorted(m.args[1]) == names for m in found)]


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The example of the documentation, and an on-policy method; both are forgotten afterwards."""
    registry.list_methods()
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    (example,) = (block.text for block in blocks(DOCUMENT.read_text()) if block.saved_as == "my_method.py")
    for name, text in (("my_method", example), ("rollouts", ROLLOUTS)):
        (tmp_path / f"{name}.py").write_text(text)
        registry.load_method_file(tmp_path / f"{name}.py")


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("name", "question"),
    [
        *(("margin_sft", test) for module in (battery, learning) for test in questions(module)),
        *(("plain_gradient", test) for test in questions(on_policy)),
    ],
    ids=lambda value: value if isinstance(value, str) else value.__name__,
)
def test_what_is_asked_of_all(name: str, question: Callable[..., None]) -> None:
    wanted = inspect.signature(question).parameters
    if wanted.keys() - {"name", "process"}:
        pytest.skip("asked in several ways")
    for process in PROCESSES if "process" in wanted else [None]:
        question(**{"name": name, **({} if process is None else {"process": process})})
