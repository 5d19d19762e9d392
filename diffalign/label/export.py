"""From votes to training data: the canonical rows of ``docs/data.md``, which every method for pairs reads."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from diffalign.errors import UserError
from diffalign.label.store import VoteStore
from diffalign.label.tasks import Task
from diffalign.label.votes import Mode, Vote
from diffalign.records import write_jsonl

Rows = Literal["tasks", "votes"]


def export_votes(store: VoteStore, output: Path, rows: Rows = "tasks") -> dict[str, int]:
    """Write a JSONL file of canonical rows; image paths are relative to it.

    Args:
        store: the votes.
        output: the file; it appears whole or not at all.
        rows: "tasks" for one row a task, all annotators together; "votes" for one row a vote.

    Returns:
        what was written and what was left out -> number.

    Raises:
        UserError: if there is nothing to write, or an image is gone.
    """
    settings = store.settings()
    tasks = {task.id: task for task in store.tasks()}
    votes = store.votes()
    given: dict[str, list[Vote]] = {}
    for vote in votes:
        if vote.verdict != "skip":
            given.setdefault(vote.task, []).append(vote)
    if not given:
        raise UserError(f"{store.path} holds no vote to export ({len(votes)} skipped)")
    records = []
    for key, answers in given.items():
        files = _files(tasks[key], Path(settings.root), output.parent)
        parts = [answers] if rows == "tasks" else [[vote] for vote in answers]
        records += [_row(tasks[key], files, part, settings.mode, rows) for part in parts]
    write_jsonl(output, records)
    return {
        "rows": len(records),
        "ties": sum(record.get("winner", 0) is None for record in records),
        "skipped votes left out": sum(vote.verdict == "skip" for vote in votes),
        "tasks without a vote": len(tasks) - len({vote.task for vote in votes}),
    }


def _row(task: Task, files: Sequence[str], votes: Sequence[Vote], mode: Mode, rows: Rows) -> dict[str, Any]:
    single = votes[0] if rows == "votes" else None
    row: dict[str, Any] = {"id": single.id if single else task.id, "prompt": task.prompt, "images": list(files)}
    row |= preference(votes, len(files), mode)
    row["tags"] = {str(index): dict(count) for index, count in tag_counts(votes).items()}
    row["metadata"] = dict(task.metadata)
    if single:
        row |= {"annotator": single.annotator, "shown": list(single.shown), "seconds": single.seconds}
    else:
        row["annotators"] = len(votes)
    return row


def preference(votes: Sequence[Vote], count: int, mode: Mode) -> dict[str, Any]:
    """Return what votes on one task say of its images.

    Comparing, the image with most votes wins; if a tie has as many, or two images, nobody does. Tagging, an image's
    score is minus the share of annotators who tagged it with any defect: with one annotator 0 for fine and -1 for bad,
    with several their mean, as in D3PO's files of human labels (arXiv 2311.13231, official code).

    Args:
        votes: none of them skipped.
        count: images of the task.
        mode: of the session.
    """
    if mode == "tag":
        return {"scores": [-sum(bool(vote.tags.get(index)) for vote in votes) / len(votes) for index in range(count)]}
    counts = Counter(vote.choice for vote in votes)
    (best, most), *others = counts.most_common()
    winner = None if others and others[0][1] == most else best
    return {"winner": winner, "votes": [counts[index] for index in range(count)]}


def tag_counts(votes: Sequence[Vote]) -> dict[int, Counter[str]]:
    """Return image -> defect -> number of votes that name it."""
    counts: dict[int, Counter[str]] = {}
    for vote in votes:
        for index, names in vote.tags.items():
            counts.setdefault(index, Counter()).update(names)
    return dict(sorted(counts.items()))


def _files(task: Task, root: Path, folder: Path) -> list[str]:
    files = []
    for name in task.images:
        path = root / name
        if not path.is_file():
            raise UserError(f"the image {path} of a labelled task is gone: restore it before exporting")
        files.append(_relative(path, folder.resolve()))
    return files


def _relative(path: Path, folder: Path) -> str:
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:  # another drive
        return path.as_posix()
