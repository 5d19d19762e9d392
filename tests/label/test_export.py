"""From votes to rows that training reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.errors import UserError
from diffalign.label.export import export_votes, preference
from diffalign.label.session import LabelSession
from diffalign.label.votes import Vote
from tests.label.support import make_session, make_vote


def submit(session: LabelSession, rows: list[tuple[str, int, int | None, str]]) -> None:
    """Enter votes: (annotator, number of the task, choice, verdict)."""
    tasks = list(session.tasks)
    for annotator, index, choice, verdict in rows:
        session.submit(make_vote(f"{annotator}-{index:05}", tasks[index], choice, annotator, verdict))  # type: ignore[arg-type]


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def voted(tmp_path: Path) -> LabelSession:
    session = make_session(tmp_path)
    submit(
        session,
        [
            ("ann", 0, 1, "choice"), ("bob", 0, 1, "choice"), ("cat", 0, 0, "choice"),  # most of three
            ("ann", 1, 0, "choice"), ("bob", 1, 1, "choice"),  # undecided
            ("ann", 2, None, "tie"),
            ("ann", 3, None, "skip"),
            ("ann", 4, 0, "choice"), ("bob", 4, None, "tie"), ("cat", 4, None, "tie"),  # a tie won
        ],
    )  # fmt: skip
    return session


def test_a_row_a_task(voted: LabelSession, tmp_path: Path) -> None:
    output = tmp_path / "deep" / "pairs.jsonl"
    written = export_votes(voted.store, output)
    assert written == {"rows": 4, "ties": 3, "skipped votes left out": 1, "tasks without a vote": 1}
    rows = {row["id"]: row for row in read(output)}
    tasks = list(voted.tasks.values())
    first = rows[tasks[0].id]
    assert first["prompt"] == "caption 0"
    assert (first["winner"], first["votes"], first["annotators"]) == (1, [1, 2], 3)
    assert first["images"] == ["../pictures/0-0.png", "../pictures/0-1.png"]
    assert all((output.parent / image).is_file() for image in first["images"])
    assert first["metadata"] == {"tag": "colors"}
    assert [rows[tasks[index].id]["winner"] for index in (1, 2, 4)] == [None, None, None]


def test_a_row_a_vote(voted: LabelSession, tmp_path: Path) -> None:
    written = export_votes(voted.store, tmp_path / "votes.jsonl", "votes")
    assert (written["rows"], written["ties"]) == (9, 3)
    rows = read(tmp_path / "votes.jsonl")
    assert [(row["annotator"], row["winner"]) for row in rows[:3]] == [("ann", 1), ("bob", 1), ("cat", 0)]
    assert len({row["id"] for row in rows}) == 9


def test_seven_images_with_marks_become_scores() -> None:
    """As D3PO's files: 0 for fine, -1 for bad, the mean of several annotators."""

    def marks(*bad: int) -> Vote:
        tags = dict.fromkeys(bad, ("hands",))
        return make_vote("vote", "task", None, "ann", "tags", shown=tuple(range(7)), tags=tags)

    assert preference([marks(2, 5)], 7, "tag") == {"scores": [0, 0, -1, 0, 0, -1, 0]}
    assert preference([marks(2, 5), marks(2)], 7, "tag") == {"scores": [0, 0, -1, 0, 0, -0.5, 0]}


def test_best_of_n() -> None:
    votes = [make_vote(f"v{i}", "t", choice, shown=(0, 1, 2, 3)) for i, choice in enumerate((2, 2, 0, 3))]
    assert preference(votes, 4, "compare") == {"winner": 2, "votes": [1, 0, 2, 1]}


def test_defects_are_counted(tmp_path: Path) -> None:
    session = make_session(tmp_path, tasks=1)
    (task,) = session.tasks
    session.submit(make_vote("vote-ann", task, 1, "ann", tags={0: ("hands",)}))
    session.submit(make_vote("vote-bob", task, 1, "bob", tags={0: ("hands", "unsafe")}))
    export_votes(session.store, tmp_path / "pairs.jsonl")
    (row,) = read(tmp_path / "pairs.jsonl")
    assert row["tags"] == {"0": {"hands": 2, "unsafe": 1}}


def test_what_cannot_be_exported(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    with pytest.raises(UserError, match="no vote to export"):
        export_votes(session.store, tmp_path / "pairs.jsonl")
    submit(session, [("ann", 0, 1, "choice")])
    (tmp_path / "pictures" / "0-1.png").unlink()
    with pytest.raises(UserError, match=r"0-1.png of a labelled task is gone"):
        export_votes(session.store, tmp_path / "pairs.jsonl")
    assert not list(tmp_path.glob("pairs*"))


def test_training_data_reads_the_export(voted: LabelSession, tmp_path: Path) -> None:
    from diffalign.data import load  # imports torch: seconds that the tests above need not wait for

    export_votes(voted.store, tmp_path / "pairs.jsonl")
    found = load.load_examples(str(tmp_path / "pairs.jsonl"), "pairs")
    assert [image.name for image in found.examples[0].images] == ["pictures/0-1.png", "pictures/0-0.png"]
    assert (len(found), dict(found.notes)) == (1, {"ties dropped": 3})
    unpaired = load.load_examples(str(tmp_path / "pairs.jsonl"), "unpaired")
    assert sorted(example.fields["label"] for example in unpaired) == [0.0, 1.0]
