"""Scorers do not hang on packages that nobody keeps up, and say which version they are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import diffalign
from diffalign.rewards.hpsv2 import OFFICIAL
from diffalign.rewards.registry import list_scorers

PACKAGE = Path(diffalign.__file__).parent
UNKEPT = {"ImageReward", "hpsv2", "clip", "mmdet", "mmcv", "open_clip", "fairscale"}


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", [PACKAGE, PACKAGE.parent / "eval"], ids=lambda path: path.name)
def test_scorer_packages_are_not_imported(folder: Path) -> None:
    found = {path.name: imported(path) & UNKEPT for path in folder.rglob("*.py")}
    assert len(found) > 10
    assert not {name: packages for name, packages in found.items() if packages}


def test_versions_are_part_of_names() -> None:
    """No name means the newest version: each has its own weights."""
    assert {"hpsv2", "hpsv2.1"} <= {scorer.name for scorer in list_scorers()}
    assert len({OFFICIAL["hpsv2"], OFFICIAL["hpsv2.1"]}) == 2
