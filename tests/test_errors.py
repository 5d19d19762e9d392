"""The listing of known names, and bounds."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from diffalign.errors import UserError, nearest, require_above, unknown


def test_few_names_are_all_listed() -> None:
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("zzz", [f"{index:02}" for index in range(12)]).endswith("10, 11")


def test_many_names_are_cut_and_counted() -> None:
    told = str(unknown("layer", "zzz", (f"{index:03}" for index in range(300))))
    assert told.startswith("unknown layer 'zzz': known: 000, 001")
    assert told.endswith("010, 011 and 288 more")


@pytest.mark.parametrize("value", [0, -1.5, math.nan])
def test_numbers_that_are_not_above_a_bound_are_named(value: float) -> None:
    require_above(0, SimpleNamespace(beta=value, gamma=0.1), "gamma")
    with pytest.raises(UserError, match=f"beta is {value}: expected a number above 0"):
        require_above(0, SimpleNamespace(beta=value, gamma=0.1), "gamma", "beta")
