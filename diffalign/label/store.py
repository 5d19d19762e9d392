"""Votes in SQLite: written through before they are acknowledged, never changed, safe with several threads."""

from __future__ import annotations

import json
import sqlite3
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.label.tasks import Task
from diffalign.label.votes import Mode, Vote

FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS session (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS tasks (
    id TEXT PRIMARY KEY, prompt TEXT NOT NULL, images TEXT NOT NULL, metadata TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS votes (
    number INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    annotator TEXT NOT NULL,
    task TEXT NOT NULL REFERENCES tasks (id),
    verdict TEXT NOT NULL,
    choice INTEGER,
    shown TEXT NOT NULL,
    tags TEXT NOT NULL,
    seconds REAL NOT NULL,
    at TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS votes_of_annotator ON votes (annotator, task, number);
CREATE INDEX IF NOT EXISTS votes_of_task ON votes (task, annotator);
"""
_COLUMNS = "id, annotator, task, verdict, choice, shown, tags, seconds"
# An annotator who answers a task again has changed their mind: the last answer counts, the earlier ones stay on record.
_CURRENT = "number IN (SELECT max(number) FROM votes GROUP BY annotator, task)"


class VoteConflict(UserError):
    """An id that is taken arrives with another answer."""


@dataclass(frozen=True)
class SessionSettings:
    """What the votes of a file have in common; fixed when the file is made.

    Args:
        root: the image folder, absolute.
        mode: "compare" or "tag".
        tags: defects that may be named.
        seed: of the orders in which tasks and images are shown.
    """

    root: str
    mode: Mode
    tags: tuple[str, ...]
    seed: int


class VoteStore:
    """The file of a labelling session.

    Args:
        path: the SQLite file.
        create: make it if it is not there.

    Raises:
        UserError: if it is not there, or is another kind of file.
    """

    def __init__(self, path: Path, create: bool = False) -> None:
        if not create and not path.is_file():
            raise UserError(f"there are no votes at {path}: `diffalign label serve` makes that file")
        self.path = path
        self._lock = threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None, timeout=30)
            # FULL: a vote that was acknowledged survives a power cut, not only a killed process.
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                self._connection.execute(f"PRAGMA {pragma}")
            if create:
                self._connection.executescript(_SCHEMA)
            self._connection.execute("SELECT number FROM votes LIMIT 1")
        except (sqlite3.DatabaseError, OSError) as error:
            raise UserError(f"cannot open {path} as a file of votes: {error}") from None

    def close(self) -> None:
        """Close the file; the write-ahead log is folded into it."""
        with self._lock:
            self._connection.close()

    def begin(self, settings: SessionSettings, tasks: Iterable[Task]) -> None:
        """Enter settings and tasks; tasks that are there already stay as they are.

        Raises:
            UserError: if the file belongs to a session with other settings.
        """
        wanted = {"format": FORMAT, **asdict(settings), "tags": list(settings.tags)}
        rows = [(task.id, task.prompt, json.dumps(task.images), json.dumps(task.metadata)) for task in tasks]
        with self._lock:
            found = {name: json.loads(value) for name, value in self._query("SELECT name, value FROM session")}
            for name, value in wanted.items():
                if name in found and found[name] != value:
                    raise UserError(
                        f"{self.path} holds votes of a session with {name} {found[name]!r}, not {value!r}: "
                        "continue it with the same options, or start another file"
                    )
            self._connection.execute("BEGIN IMMEDIATE")
            values = [(name, json.dumps(value)) for name, value in wanted.items()]
            self._connection.executemany("INSERT OR IGNORE INTO session VALUES (?, ?)", values)
            self._connection.executemany("INSERT OR IGNORE INTO tasks VALUES (?, ?, ?, ?)", rows)
            self._connection.execute("COMMIT")

    def settings(self) -> SessionSettings:
        """Return what the session was begun with.

        Raises:
            UserError: if it never was, or by a version of another format.
        """
        found = {name: json.loads(value) for name, value in self._read("SELECT name, value FROM session")}
        if found.get("format") != FORMAT:
            raise UserError(f"{self.path} holds no labelling session of format {FORMAT}")
        return SessionSettings(found["root"], found["mode"], tuple(found["tags"]), found["seed"])

    def tasks(self) -> list[Task]:
        """Return every task that was ever part of the session, in the order of their arrival."""
        rows = self._read("SELECT id, prompt, images, metadata FROM tasks ORDER BY rowid")
        return [Task(key, prompt, tuple(json.loads(i)), json.loads(m)) for key, prompt, i, m in rows]

    def add(self, vote: Vote) -> bool:
        """Write a vote through to the disk.

        Returns:
            True if it is new, False if this very vote had arrived before.

        Raises:
            VoteConflict: if another vote has its id.
        """
        row = _to_row(vote)
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        with self._lock:
            written = self._connection.execute(
                f"INSERT INTO votes ({_COLUMNS}, at) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING",
                (*row, now),
            )
            if written.rowcount == 1:
                return True
            (earlier,) = self._query(f"SELECT {_COLUMNS} FROM votes WHERE id = ?", vote.id)
        if tuple(earlier) != row:
            raise VoteConflict(f"the vote id {vote.id!r} is taken by another vote")
        return False

    def votes(self) -> list[Vote]:
        """Return the votes that count, the last of each annotator and task, in the order in which they were given."""
        return [_to_vote(row) for row in self._read(f"SELECT {_COLUMNS} FROM votes WHERE {_CURRENT} ORDER BY number")]

    def count(self) -> int:
        """Number of votes ever given, changed ones included."""
        return int(self._read("SELECT count(*) FROM votes")[0][0])

    def answered(self, annotator: str) -> list[str]:
        """Return the tasks that an annotator has answered, the one answered last at the end."""
        rows = self._read("SELECT task FROM votes WHERE annotator = ? GROUP BY task ORDER BY max(number)", annotator)
        return [task for (task,) in rows]

    def last_vote(self, annotator: str, task: str) -> Vote | None:
        """Return the vote of an annotator on a task that counts."""
        rows = self._read(
            f"SELECT {_COLUMNS} FROM votes WHERE annotator = ? AND task = ? ORDER BY number DESC LIMIT 1",
            annotator,
            task,
        )
        return _to_vote(rows[0]) if rows else None

    def full(self, annotator: str, votes_per_task: int) -> set[str]:
        """Return the tasks that so many others have answered (skipping is no answer)."""
        rows = self._read(
            "SELECT task FROM votes WHERE annotator <> ? AND verdict <> 'skip' "
            "GROUP BY task HAVING count(DISTINCT annotator) >= ?",
            annotator,
            votes_per_task,
        )
        return {task for (task,) in rows}

    def _read(self, statement: str, *values: Any) -> list[Sequence[Any]]:
        with self._lock:
            return self._query(statement, *values)

    def _query(self, statement: str, *values: Any) -> list[Sequence[Any]]:
        return self._connection.execute(statement, values).fetchall()


def _to_row(vote: Vote) -> tuple[Any, ...]:
    tags: Mapping[str, list[str]] = {str(index): sorted(names) for index, names in sorted(vote.tags.items()) if names}
    return (
        vote.id,
        vote.annotator,
        vote.task,
        vote.verdict,
        vote.choice,
        json.dumps(vote.shown),
        json.dumps(tags),
        vote.seconds,
    )


def _to_vote(row: Sequence[Any]) -> Vote:
    key, annotator, task, verdict, choice, shown, tags, seconds = row
    named = {int(index): tuple(names) for index, names in json.loads(tags).items()}
    return Vote(key, annotator, task, verdict, choice, tuple(json.loads(shown)), named, seconds)
