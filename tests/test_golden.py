"""Published numbers: one item for each case of each file under the folder given by ``--golden`` (tests/golden)."""

from __future__ import annotations

import importlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.golden_cases.base import GoldenCase

CASES = Path(__file__).parent / "golden_cases"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    folder: Path = metafunc.config.getoption("golden")
    walked = os.walk(folder, followlinks=True)  # unlike rglob
    files = sorted(Path(root) / name for root, _, names in walked for name in names if name.endswith(".json"))
    if not files:
        raise pytest.UsageError(f"--golden: no *.json under {folder}")
    found = [(file.relative_to(folder).as_posix(), record) for file in files for record in _cases(file)]
    ids = [f"{name}::{record.get('name', 'unnamed')}" for name, record in found]
    metafunc.parametrize(("file", "record"), found, ids=ids)


def _cases(file: Path) -> list[dict[str, Any]]:
    """Cases of a file; one that says what is wrong if the file cannot be read."""
    try:
        cases = json.loads(file.read_text(encoding="utf-8"))["cases"]
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return [{"name": "unreadable", "problem": repr(problem)}]
    if not isinstance(cases, list) or not all(isinstance(case, dict) for case in cases):
        return [{"name": "unreadable", "problem": "its cases are no list of records"}]
    return cases or [{"name": "empty", "problem": "the file has no cases"}]


def test_golden(file: str, record: dict[str, Any]) -> None:
    if "problem" in record:
        pytest.fail(f"{file}: {record['problem']}")
    case = GoldenCase.of(file, record)
    module = file.removesuffix(".json")
    assert (CASES / f"{module}.py").is_file(), f"no product function is tied to {file}"
    run = importlib.import_module("tests.golden_cases." + module.replace("/", ".")).run
    case.check(run(case))
