"""A folder of pictures, a session over it, and a server for it in a thread."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from PIL import Image

from diffalign.label.access import Access
from diffalign.label.app import create_app
from diffalign.label.session import LabelSession
from diffalign.label.store import SessionSettings, VoteStore
from diffalign.label.tasks import Task
from diffalign.label.votes import Mode, Verdict, Vote

TAGS = ("hands", "unsafe")


def write_pictures(folder: Path, tasks: int, images: int = 2, size: int = 16) -> list[Task]:
    """Write pictures of as many colours and return tasks over them."""
    made = []
    for task in range(tasks):
        names = [f"pictures/{task}-{image}.png" for image in range(images)]
        for image, name in enumerate(names):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, size), (40 * task % 256, 110 * image % 256, 90)).save(folder / name)
        made.append(Task.of(f"caption {task}", names, {"tag": "colors"}))
    return made


def make_session(
    folder: Path, tasks: int = 6, images: int = 2, mode: Mode = "compare", votes_per_task: int = 0, size: int = 16
) -> LabelSession:
    """A session over pictures written into a folder; votes go to ``votes.db`` there."""
    made = write_pictures(folder, tasks, images, size)
    settings = SessionSettings(str(folder.resolve()), mode, TAGS, 0)
    store = VoteStore(folder / "votes.db", create=True)
    store.begin(settings, made)
    return LabelSession(store, settings, made, votes_per_task)


def make_vote(
    key: str, task: str, choice: int | None = 0, annotator: str = "ann", verdict: Verdict = "choice", **more: Any
) -> Vote:
    """A vote on a task of two images."""
    return Vote(key, annotator, task, verdict, choice, **{"shown": (0, 1), **more})


@contextmanager
def running(session: LabelSession, port: int = 0) -> Iterator[int]:
    """Serve a session from a thread of this process; gives the port."""
    listening = socket.create_server(("127.0.0.1", port))
    server = uvicorn.Server(uvicorn.Config(create_app(session, Access()), log_level="warning"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield listening.getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
        listening.close()


class Client:
    """An annotator over one connection, who prefers whatever is shown leftmost.

    Args:
        port: of the server on this machine.
        annotator: the name.
    """

    def __init__(self, port: int, annotator: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        self.annotator = annotator
        self.acknowledged: list[str] = []
        self.repeated = 0

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """Call the server; once more over a new connection if the old one had been closed for idleness."""
        try:
            answer = self._send(method, path, body)
        except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
            self.repeated += 1
            answer = self._send(method, path, body)
        text = answer.read()
        assert answer.status == 200, text
        return json.loads(text)

    def _send(self, method: str, path: str, body: Any) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body)
        self._connection.request(method, path, data, {"Content-Type": "application/json"} if data else {})
        return self._connection.getresponse()

    def vote(self, repeat: bool = False) -> bool:
        """Answer the next task, twice if so wanted; False when there is none."""
        tasks = self.call("GET", f"/api/next?annotator={self.annotator}")["tasks"]
        if not tasks:
            return False
        body = {
            "id": f"{self.annotator}-{tasks[0]['id']}",
            "annotator": self.annotator,
            "task": tasks[0]["id"],
            "verdict": "choice",
            "choice": tasks[0]["images"][0],
            "shown": tasks[0]["images"],
            "seconds": 1.5,
        }
        before = self.repeated
        assert self.call("POST", "/api/votes", body)["new"] or self.repeated > before
        self.acknowledged.append(body["id"])
        if repeat:
            assert self.call("POST", "/api/votes", body)["new"] is False
        return True
