"""The page of the labelling app works as written; people and their browser are played here."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.label import serve as serving
from diffalign.label.session import LabelSession
from tests.data.support import write_images
from tests.docs.documents import run_document
from tests.label.support import make_vote

PAGE = Path(__file__).resolve().parents[2] / "docs" / "labelling.md"


def two_people(session: LabelSession, host: str, port: int, token: str | None) -> None:
    """Answer everything, then leave, as Ctrl-C would."""
    assert (host, token) == ("127.0.0.1", None)
    for name in ("ann", "bob"):
        for number, task in enumerate(session.tasks.values()):
            shown = tuple(session.shown(name, task))
            session.submit(make_vote(f"{name}-{number:04}", task.id, 0, name, shown=shown, seconds=2.0))
    session.store.close()


def test_the_page_works_as_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(serving, "serve", two_people)
    names = [f"my_images/{model}/{index}.png" for model in ("before", "after") for index in range(3)]
    write_images(tmp_path, names)
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text(f"caption {Path(name).stem}")
    assert run_document(PAGE.read_text(), tmp_path) == 3
    said = capsys.readouterr().out
    assert "bob: 3 votes (3 choice)" in said
    assert "pairs.jsonl: 3 rows, 0 ties" in said
    assert list(tmp_path.glob("runs/*/pytorch_lora_weights.safetensors"))
