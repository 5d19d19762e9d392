"""Who is asked what, in which order; all follows from seed, annotator and votes, so a reload changes nothing."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from diffalign.errors import UserError
from diffalign.label.store import SessionSettings, VoteStore
from diffalign.label.tasks import Task
from diffalign.label.votes import Vote, check_vote


@dataclass(frozen=True)
class Progress:
    """How far an annotator is.

    Args:
        done: tasks answered or skipped.
        total: those, and the ones still to come.
        upcoming: the next tasks.
    """

    done: int
    total: int
    upcoming: tuple[Task, ...]


class LabelSession:
    """A running session.

    Args:
        store: its votes.
        settings: as the store holds them.
        tasks: the tasks that are asked now; votes on others stay in the store.
        votes_per_task: annotators wanted for each task; 0 for all who come.
    """

    def __init__(
        self, store: VoteStore, settings: SessionSettings, tasks: Sequence[Task], votes_per_task: int = 0
    ) -> None:
        self.store, self.settings = store, settings
        self.tasks = {task.id: task for task in tasks}
        self._votes_per_task = votes_per_task
        self._pictures = {self.picture_id(name): Path(settings.root) / name for task in tasks for name in task.images}
        self._order = lru_cache(maxsize=256)(self._order_of)

    def progress(self, annotator: str, ahead: int = 2) -> Progress:
        """Return how far an annotator is and what comes next."""
        answered = {task for task in self.store.answered(annotator) if task in self.tasks}
        closed = self.store.full(annotator, self._votes_per_task) if self._votes_per_task else set()
        waiting = [task for task in self._order(annotator) if task.id not in answered and task.id not in closed]
        return Progress(len(answered), len(answered) + len(waiting), tuple(waiting[:ahead]))

    def task_before(self, annotator: str, task: str | None) -> Task | None:
        """Return the task that an annotator answered before another one, or last of all."""
        answered = [key for key in self.store.answered(annotator) if key in self.tasks]
        if task in answered:
            answered = answered[: answered.index(task)]
        return self.tasks[answered[-1]] if answered else None

    def shown(self, annotator: str, task: Task) -> list[int]:
        """Return the images of a task in the order in which an annotator sees them: random, and always the same."""
        order = list(range(len(task.images)))
        random.Random(self._digest("images", annotator, task.id)).shuffle(order)
        return order

    def submit(self, vote: Vote) -> bool:
        """Check a vote and write it; returns whether it is new.

        Raises:
            UserError: if it does not answer a task of the session, or its id is taken.
        """
        if vote.task not in self.tasks:
            raise UserError(f"there is no task {vote.task!r} in this session")
        check_vote(vote, self.tasks[vote.task], self.settings.mode, self.settings.tags)
        return self.store.add(vote)

    def picture_id(self, name: str) -> str:
        """Return the name under which the page knows an image; it tells nothing of model, place or file."""
        return self._digest("picture", name)[:24]

    def picture(self, picture_id: str) -> Path | None:
        """Return the file of an image, or None for what is not part of the session or has left the image folder."""
        path = self._pictures.get(picture_id)
        # Looked at again on each request: a file may have become a link since the session began.
        if path is None or not path.is_file() or not path.resolve().is_relative_to(self.settings.root):
            return None
        return path

    def _order_of(self, annotator: str) -> tuple[Task, ...]:
        # By hash, not by shuffling: when the source grows, the order of what was there stays.
        return tuple(sorted(self.tasks.values(), key=lambda task: self._digest("task", annotator, task.id)))

    def _digest(self, *words: str) -> str:
        return hashlib.blake2b("\n".join((str(self.settings.seed), *words)).encode(), digest_size=16).hexdigest()
