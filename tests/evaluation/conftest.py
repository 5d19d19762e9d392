"""The scripts of ``eval/``, called in this process; folders of pictures whose truth is known."""

from __future__ import annotations

import json
import random
import runpy
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from PIL import Image

from diffalign.world.grammar import prompts
from diffalign.world.render import render

EVAL = Path(__file__).resolve().parents[2] / "eval"


class Answer(NamedTuple):
    """What a script did."""

    status: int
    out: str
    err: str


@pytest.fixture
def script(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """``script("geneval", "--images", folder)`` runs ``eval/geneval.py``."""

    def run(name: str, *words: object) -> Answer:
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", [str(EVAL / f"{name}.py"), *(str(word) for word in words)])
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(EVAL / f"{name}.py"), run_name="__main__")
        return Answer(int(stop.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def refused(script: Callable[..., Answer]) -> Callable[..., str]:
    """``refused("geneval", ...)`` runs a script that must fail as a user's mistake, and returns its one message."""

    def run(name: str, *words: object) -> str:
        answer = script(name, *words)
        assert answer.status == 2, answer
        assert len(answer.err.splitlines()) == 1, answer.err
        return answer.err

    return run


def write_geneval(folder: Path, rows: Sequence[dict[str, Any]], pictures: int = 1) -> Path:
    """Write true pictures of captions of the bundled world in GenEval's layout."""
    for index, row in enumerate(rows):
        part = folder / f"{index:05d}"
        (part / "samples").mkdir(parents=True)
        (part / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        for sample in range(pictures):
            picture = render(row, random.Random(100 * index + sample))
            Image.fromarray(picture).save(part / "samples" / f"{sample:05d}.png")
    return folder


@pytest.fixture
def true_pictures(tmp_path: Path) -> Path:
    """Twelve captions of the bundled world with one true picture each."""
    return write_geneval(tmp_path / "true", [record.metadata for record in prompts("test", 12, seed=3)])
