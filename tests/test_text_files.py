"""Text files are UTF-8, whatever the machine's own encoding is: captions are in every language."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("diffalign", "eval", "train_scripts", "benchmarks")


def unspecified(source: str) -> list[int]:
    """Lines that read or write text in the machine's own encoding."""
    return [call.lineno for call in ast.walk(ast.parse(source)) if isinstance(call, ast.Call) and _forgets(call)]


def _forgets(call: ast.Call) -> bool:
    if any(keyword.arg == "encoding" for keyword in call.keywords):
        return False
    if isinstance(call.func, ast.Name):
        return call.func.id == "open" and not _binary(call.args[1:2])
    if not isinstance(call.func, ast.Attribute):
        return False
    if call.func.attr == "open":  # of a path: its first argument is the mode
        modes = [argument for argument in call.args[:1] if isinstance(argument, ast.Constant)]
        return bool(modes) and isinstance(modes[0].value, str) and not _binary(modes)
    return call.func.attr in ("read_text", "write_text")


def _binary(modes: list[ast.expr]) -> bool:
    return any(isinstance(mode, ast.Constant) and "b" in str(mode.value) for mode in modes)


def _files() -> Iterator[Path]:
    for folder in SOURCES:
        yield from (ROOT / folder).rglob("*.py")


def test_every_text_file_is_opened_as_utf8() -> None:
    places = [f"{path.relative_to(ROOT)}:{line}" for path in _files() for line in unspecified(path.read_text("utf-8"))]
    assert not places


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("path.read_text()", True),
        ("path.write_text(text)", True),
        ("open(path)", True),
        ("open(path, 'rb')", False),
        ("path.open('a')", True),
        ("path.open('rb')", False),
        ("path.read_text(encoding='utf-8')", False),
        ("path.open('w', encoding='utf-8')", False),
        ("Image.open(path)", False),
    ],
)
def test_the_search_itself(source: str, found: bool) -> None:
    assert bool(unspecified(source)) == found
