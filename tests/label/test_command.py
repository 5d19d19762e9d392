"""``diffalign label`` on the command line."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from diffalign.cli.main import main
from diffalign.errors import UserError
from diffalign.label import serve as serving
from tests.label.support import make_session, make_vote


def test_agreement_and_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    session = make_session(tmp_path)
    for name in ("ann", "bob"):
        for index, task in enumerate(session.tasks):
            session.submit(make_vote(f"{name}-{index:04}", task, index % 2, name))
    votes = str(tmp_path / "votes.db")
    assert main(["label", "agreement", votes]) == 0
    assert "Krippendorff's alpha (nominal) 1.000" in capsys.readouterr().out
    assert main(["label", "export", votes, "--output", str(tmp_path / "pairs.jsonl"), "--rows", "votes"]) == 0
    assert "12 rows, 0 ties" in capsys.readouterr().out


def test_mistakes_are_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def message(*words: str) -> str:
        assert main(["label", *words]) == 2
        return capsys.readouterr().err

    assert "did you mean 'export'" in message("exprot")
    assert "there are no votes at" in message("export", str(tmp_path / "votes.db"))
    assert main(["label", "--help"]) == 0


def test_looking_at_votes_loads_no_model_library() -> None:
    """The command answers at once, also beside a training run."""
    code = "import sys, diffalign.label.export, diffalign.label.app; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_token_is_made_for_other_addresses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(serving.uvicorn.Server, "run", lambda self, sockets: None)

    def address(host: str, token: str | None = None) -> str:
        session = make_session(tmp_path / host.replace(":", "_"))
        serving.serve(session, host, 0, token)
        return capsys.readouterr().out.splitlines()[0].split()[-1]

    assert address("127.0.0.1").endswith("/")
    assert len(address("0.0.0.0").split("?token=")[1]) >= 24
    assert address("localhost", "a-token-of-mine").endswith("?token=a-token-of-mine")
    with pytest.raises(UserError, match="fewer than 8"):
        address("0.0.0.0", "short")


def test_a_port_in_use(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError, match="cannot listen on localhost"):
        serving.serve(make_session(tmp_path), "localhost", taken.getsockname()[1], None)
