"""Votes on disk, and who is asked what."""

from __future__ import annotations

import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest

from diffalign.errors import UserError
from diffalign.label.store import VoteConflict, VoteStore
from diffalign.label.votes import check_vote
from tests.label.support import TAGS, make_session, make_vote


def test_votes_come_back_as_they_were(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    first, second, *_ = session.tasks
    votes = [
        make_vote("vote-0001", first, 1, shown=(1, 0), tags={0: ("hands", "unsafe")}, seconds=2.25),
        make_vote("vote-0002", second, None, verdict="tie"),
        make_vote("vote-0003", first, 0, annotator="Bé Ω"),
    ]
    assert all(session.submit(vote) for vote in votes)
    session.store.close()
    again = VoteStore(tmp_path / "votes.db")
    assert again.votes() == votes
    assert [vote.position for vote in votes] == [0, None, 0]
    assert again.settings() == session.settings
    assert again.tasks() == list(session.tasks.values())


def test_a_vote_counts_once_and_never_changes(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    task = next(iter(session.tasks))
    vote = make_vote("vote-0001", task)
    assert [session.submit(vote) for _ in range(3)] == [True, False, False]
    with pytest.raises(VoteConflict, match="taken by another vote"):
        session.submit(replace(vote, choice=1))
    assert session.store.votes() == [vote]


def test_the_last_answer_counts(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    first, second, *_ = session.tasks
    for key, task, choice in (("vote-0001", first, 0), ("vote-0002", second, 0), ("vote-0003", first, 1)):
        session.submit(make_vote(key, task, choice))
    assert [(vote.id, vote.choice) for vote in session.store.votes()] == [("vote-0002", 0), ("vote-0003", 1)]
    assert session.store.count() == 3
    assert session.store.answered("ann") == [second, first]


def test_the_file_is_written_ahead_and_through(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    other = sqlite3.connect(tmp_path / "votes.db")
    assert other.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert session.store._connection.execute("PRAGMA synchronous").fetchone() == (2,)
    session.submit(make_vote("vote-0001", next(iter(session.tasks))))
    # Another process sees the vote while the app runs.
    assert other.execute("SELECT count(*) FROM votes").fetchone() == (1,)


def test_a_file_belongs_to_one_session(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    session.store.begin(session.settings, session.tasks.values())
    with pytest.raises(UserError, match="mode 'compare', not 'tag'"):
        session.store.begin(replace(session.settings, mode="tag"), [])
    with pytest.raises(UserError, match="there are no votes at"):
        VoteStore(tmp_path / "other.db")
    (tmp_path / "text.db").write_text("no database, and long enough to be looked at" * 20)
    with pytest.raises(UserError, match="as a file of votes"):
        VoteStore(tmp_path / "text.db", create=True)
    sqlite3.connect(tmp_path / "foreign.db").execute("CREATE TABLE t (x)")
    with pytest.raises(UserError, match="as a file of votes"):
        VoteStore(tmp_path / "foreign.db")
    with pytest.raises(UserError, match="no labelling session"):
        VoteStore(tmp_path / "new.db", create=True).settings()


def test_what_does_not_answer_the_task_is_refused(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    task = next(iter(session.tasks.values()))
    good = make_vote("vote-0001", task.id)
    check_vote(good, task, "compare", TAGS)
    for change, said in (
        ({"verdict": "tags", "choice": None}, "takes choice, tie, skip"),
        ({"choice": 2}, "the task has 2 images"),
        ({"choice": None}, "lacks a choice"),
        ({"verdict": "tie"}, "has a choice"),
        ({"shown": (0, 0)}, "each of 2 images once"),
        ({"tags": {5: ("hands",)}}, "tags name image 5"),
        ({"tags": {0: ("hand",)}}, "unknown tag 'hand': did you mean 'hands'"),
        ({"task": "elsewhere"}, "no task 'elsewhere'"),
    ):
        with pytest.raises(UserError, match=said):
            session.submit(replace(good, **change))
    assert session.store.count() == 0


def test_orders_are_random_and_repeat(tmp_path: Path) -> None:
    session = make_session(tmp_path, tasks=40)
    orders = {name: [task.id for task in session.progress(name, 40).upcoming] for name in ("ann", "bob")}
    assert sorted(orders["ann"]) == sorted(orders["bob"]) == sorted(session.tasks)
    assert orders["ann"] != orders["bob"]
    assert [task.id for task in session.progress("ann", 40).upcoming] == orders["ann"]
    shown = [session.shown("ann", task) for task in session.tasks.values()]
    assert shown == [session.shown("ann", task) for task in session.tasks.values()]
    assert 10 < sum(order == [0, 1] for order in shown) < 30


def test_progress_goes_on_where_it_stopped(tmp_path: Path) -> None:
    session = make_session(tmp_path, tasks=3)
    first, second = session.progress("ann").upcoming
    session.submit(make_vote("vote-0001", first.id))
    progress = session.progress("ann")
    assert (progress.done, progress.total, progress.upcoming[0]) == (1, 3, second)
    session.submit(make_vote("vote-0002", second.id, None, verdict="skip"))
    assert session.progress("ann").done == 2
    assert session.task_before("ann", None) == second
    assert session.task_before("ann", second.id) == first
    assert session.task_before("ann", first.id) is None
    assert session.progress("bob").done == 0


def test_a_task_closes_with_the_votes_it_needs(tmp_path: Path) -> None:
    session = make_session(tmp_path, tasks=3, votes_per_task=1)
    answered, skipped, left = session.tasks
    session.submit(make_vote("vote-0001", answered))
    session.submit(make_vote("vote-0002", skipped, None, verdict="skip"))
    assert {task.id for task in session.progress("bob").upcoming} == {skipped, left}
    assert session.progress("ann").total == 3


def test_only_the_sessions_images_are_found_and_only_inside(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    name = next(iter(session.tasks.values())).images[0]
    path = tmp_path / name
    known = session.picture_id(name)
    assert session.picture(known) == path
    assert session.picture(name) is None
    assert session.picture("../votes.db") is None
    path.rename(tmp_path / "moved.png")
    path.symlink_to("/etc/passwd")
    assert session.picture(known) is None
