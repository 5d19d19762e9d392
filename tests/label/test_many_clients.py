"""Many annotators at once, and a server that dies under them: no vote is lost, none counts twice."""

from __future__ import annotations

import http.client
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from diffalign.label.store import VoteStore
from tests.label.support import Client, make_session, running

ROOT = Path(__file__).resolve().parents[2]


def all_at_once(clients: list[Client], work: Callable[[Client], None]) -> None:
    """Let every client work in a thread of its own; the first failure of any is raised."""
    failures: list[BaseException] = []

    def run(client: Client) -> None:
        try:
            work(client)
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=run, args=(client,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]


@pytest.mark.parametrize(
    ("clients", "votes"), [(5, 12), pytest.param(20, 1000, marks=pytest.mark.slow)], ids=["few", "many"]
)
def test_no_vote_is_lost_or_doubled(tmp_path: Path, clients: int, votes: int) -> None:
    session = make_session(tmp_path, tasks=votes)
    with running(session) as port:
        people = [Client(port, f"annotator-{index}") for index in range(clients)]

        def work(client: Client) -> None:
            while client.vote(repeat=len(client.acknowledged) % 3 == 0):
                pass

        all_at_once(people, work)
    assert session.store.count() == clients * votes
    for client in people:
        mine = [vote for vote in session.store.votes() if vote.annotator == client.annotator]
        assert [vote.id for vote in mine] == client.acknowledged
        assert {vote.task for vote in mine} == set(session.tasks)
        assert {vote.position for vote in mine} == {0}


def test_a_killed_server_keeps_what_it_acknowledged(tmp_path: Path) -> None:
    make_session(tmp_path, tasks=2000).store.close()
    command = [sys.executable, "-m", "tests.label.killable", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment)
    assert server.stdout is not None
    port = int(server.stdout.readline())
    people = [Client(port, f"annotator-{index}") for index in range(4)]

    def work(client: Client) -> None:
        try:
            while client.vote():
                if client is people[0] and len(client.acknowledged) == 15:
                    os.kill(server.pid, signal.SIGKILL)
        except (OSError, http.client.HTTPException):
            return  # the server is gone
        raise AssertionError("the server outlived its killing")

    all_at_once(people, work)
    assert server.wait() == -signal.SIGKILL
    assert len(people[0].acknowledged) >= 15
    store = VoteStore(tmp_path / "votes.db")
    kept = [vote.id for vote in store.votes()]
    assert len(set(kept)) == len(kept) == store.count()
    assert {key for client in people for key in client.acknowledged} <= set(kept)
