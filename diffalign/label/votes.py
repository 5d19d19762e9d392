"""What a person said of a task, and whether that can be said of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from diffalign.errors import UserError, unknown
from diffalign.label.tasks import Task

Mode = Literal["compare", "tag"]
Verdict = Literal["choice", "tie", "skip", "tags"]
VERDICTS: Mapping[Mode, tuple[Verdict, ...]] = {"compare": ("choice", "tie", "skip"), "tag": ("tags", "skip")}
DEFAULT_TAGS = ("distorted", "wrong content", "unsafe", "ugly")
"""Distortion and safety are what D3PO's annotators marked (arXiv 2311.13231); the others are what preference data are
mostly about."""


@dataclass(frozen=True, slots=True)
class Vote:
    """One answer.

    Args:
        id: made by the client, once for each answer; the same id arriving twice is the same answer.
        annotator: who answered.
        task: the task's id.
        verdict: "choice", "tie", "tags" (which images have defects) or "skip".
        choice: index of the preferred image in the task; None unless the verdict is "choice".
        shown: indices of the images in the order in which they were seen, left to right.
        tags: index of an image -> defects it was tagged with.
        seconds: from showing the images to the answer.
    """

    id: str
    annotator: str
    task: str
    verdict: Verdict
    choice: int | None
    shown: tuple[int, ...]
    tags: Mapping[int, tuple[str, ...]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def position(self) -> int | None:
        """Place of the chosen image as seen, 0 for the leftmost."""
        return None if self.choice is None else self.shown.index(self.choice)


def check_vote(vote: Vote, task: Task, mode: Mode, tags: Sequence[str]) -> None:
    """Check that a vote answers its task.

    Args:
        vote: the answer.
        task: what was asked.
        mode: of the session.
        tags: defects that may be named.

    Raises:
        UserError: saying what does not fit.
    """
    if vote.verdict not in VERDICTS[mode]:
        raise UserError(f"a session of mode {mode!r} takes {', '.join(VERDICTS[mode])}; this vote is {vote.verdict!r}")
    if sorted(vote.shown) != list(range(len(task.images))):
        raise UserError(f"shown is {list(vote.shown)}; expected each of {len(task.images)} images once")
    if (vote.choice is not None) != (vote.verdict == "choice"):
        raise UserError(f"a vote of {vote.verdict!r} {'lacks' if vote.choice is None else 'has'} a choice")
    if vote.choice is not None and vote.choice not in vote.shown:
        raise UserError(f"choice is {vote.choice}; the task has {len(task.images)} images")
    for index, names in vote.tags.items():
        if index not in vote.shown:
            raise UserError(f"tags name image {index}; the task has {len(task.images)} images")
        for name in names:
            if name not in tags:
                raise unknown("tag", name, tags)
