"""The command line, called in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from diffalign.cli.main import main


class Answer(NamedTuple):
    """What a command did."""

    status: int
    out: str
    err: str


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """``cli("methods", "--format", "json")`` runs a command and returns status, output and errors."""

    def run(*words: object) -> Answer:
        capsys.readouterr()
        try:
            status = main([str(word) for word in words])
        except SystemExit as stop:
            status = int(stop.code or 0)
        return Answer(status, *capsys.readouterr())

    return run


@pytest.fixture
def refused(cli: Callable[..., Answer]) -> Callable[..., str]:
    """``refused("train", ...)`` runs a command that must fail as a user's mistake, and returns its message."""

    def run(*words: object) -> str:
        answer = cli(*words)
        assert answer.status == 2, answer
        lines = [line for line in answer.err.splitlines() if not line.startswith("try: ")]
        assert len(lines) == 1, answer.err
        assert "Traceback" not in answer.err
        return lines[0]

    return run
