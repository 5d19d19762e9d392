"""Work on a data set that several processes share out among themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

T = TypeVar("T")

Progress = Callable[[str, int, int], None]
"""Called with (what is done, how many are done, how many there are) while work on a data set goes on."""


class Team(Protocol):
    """The processes of a run as the data side sees them; ``training.processes.Processes`` is one."""

    @property
    def rank(self) -> int: ...

    @property
    def world_size(self) -> int: ...

    def together(self, work: Callable[[], T]) -> list[T]: ...


class Alone:
    """A team of one."""

    rank = 0
    world_size = 1

    def together(self, work: Callable[[], T]) -> list[T]:
        """Do the work."""
        return [work()]


def share_of(team: Team, items: Sequence[T], block: int) -> list[T]:
    """Return the items of this process: every ``world_size``-th block.

    Neighbours stay together, as rows about one caption often share images; what has been done of a longer list in an
    earlier run is spread over all.
    """
    return [item for index, item in enumerate(items) if index // block % team.world_size == team.rank]
