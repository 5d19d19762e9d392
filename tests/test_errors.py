"""The listing of known names."""

from __future__ import annotations

from diffalign.errors import nearest, unknown


def test_few_names_are_all_listed() -> None:
    assert nearest("zzz", ["b", "a"]) == "known: a, b"
    assert nearest("zzz", [f"{index:02}" for index in range(12)]).endswith("10, 11")


def test_many_names_are_cut_and_counted() -> None:
    told = str(unknown("layer", "zzz", (f"{index:03}" for index in range(300))))
    assert told.startswith("unknown layer 'zzz': known: 000, 001")
    assert told.endswith("010, 011 and 288 more")
