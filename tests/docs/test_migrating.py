"""Options that the page for users of other trainers names exist, for the method of their table, with those values."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from diffalign.cli.parser import parse_train
from diffalign.strategies.registry import get_method
from diffalign.training.config import option_defaults
from tests.docs.documents import blocks

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migrating.md").read_text(encoding="utf-8")
_TABLE = re.compile(r"^Method: `(\w+)`\n\n\|.*\n\| --- .*\n((?:\|.*\n)+)", re.MULTILINE)
ROWS = [
    (table[1], [cell.strip() for cell in line.strip("|").split("|")])
    for table in _TABLE.finditer(PAGE)
    for line in table[2].splitlines()
]


def test_all_tables_are_read() -> None:
    assert len(_TABLE.findall(PAGE)) == len(re.findall(r"^\| --- ", PAGE, re.MULTILINE)) == 5
    assert len(ROWS) > 80


@pytest.mark.parametrize(("method", "row"), ROWS, ids=lambda value: value if isinstance(value, str) else value[0][:40])
def test_named_options_exist(method: str, row: list[str]) -> None:
    old, here, remark = row
    assert old
    assert here or remark, f"{old}: neither an option nor a reason"
    known = option_defaults(get_method(method).strategy.Config)
    for code in re.findall(r"`([^`]+)`", here):
        name, *value = shlex.split(code) if "{" not in code else code.split(" ", 1)
        assert name.removeprefix("--") in known, f"{method} has no {name}"
        if value:
            parse_train(["--method", method, "--preset", "none", name, *value], "image", "x")


def test_the_old_command_is_covered() -> None:
    """Every flag of the old command lines stands in the first table."""
    old = next(block.text for block in blocks(PAGE) if block.language == "text")
    flags = re.findall(r"--(?!mixed_precision)\w+", old)
    named = {flag for _, row in ROWS for flag in re.findall(r"`(--\w+)`", row[0])}
    assert len(flags) > 10
    assert set(flags) <= named
