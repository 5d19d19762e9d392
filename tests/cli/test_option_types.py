"""Options given in Python are held to the types of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest

from diffalign.errors import UserError
from diffalign.strategies.registry import list_methods
from diffalign.training.config import RunOptions
from diffalign.training.option_types import check_types, describe, fits
from diffalign.training.resolve import resolve_config


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (1, float, True),
        (1.5, int, False),
        (True, int, False),
        (1, bool, False),
        (None, str | None, True),
        (3, str | None, False),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (["a"], list[str], True),
        ("a", list[str], False),
        ([1], list[str], False),
        ({"a": "b"}, dict[str, str], True),
        ({"a": 1}, dict[str, str], False),
    ],
)
def test_values_fit_their_types(value: object, hint: object, expected: bool) -> None:
    assert fits(value, hint) is expected


def test_types_are_told_in_words() -> None:
    assert describe(str | None) == "of type str or None"
    assert describe(list[Literal["a", "b"]]) == "a list, each one of 'a', 'b'"
    assert describe(dict[str, str]) == "a mapping of names"


def test_the_message_names_option_value_and_expectation() -> None:
    check_types(RunOptions, {"logging_steps": 3, "an_option_of_another_group": object()})
    with pytest.raises(UserError, match="option 'logging_steps' is 'often', a str, but must be of type int"):
        check_types(RunOptions, {"logging_steps": "often"})


def test_paths_may_be_path_objects() -> None:
    assert resolve_config("sft", {"output_dir": Path("a") / "b"}).run.output_dir == str(Path("a") / "b")


@pytest.mark.parametrize("name", [method.name for method in list_methods()])
def test_every_method_can_be_configured(name: str) -> None:
    """No option of a method hides one of the run, and its presets name options that exist."""
    assert resolve_config(name, {}).method == name
