"""The web application through the framework's client."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.label.support import make_session

pytest.importorskip("fastapi", reason="pip install 'diffalign[app]'")

from fastapi.testclient import TestClient

from diffalign.label.access import COOKIE, Access, is_loopback
from diffalign.label.app import PAGE_FILES, create_app
from diffalign.label.session import LabelSession

TOKEN = "a-secret-of-the-laboratory"


@pytest.fixture
def session(tmp_path: Path) -> LabelSession:
    return make_session(tmp_path)


@pytest.fixture
def client(session: LabelSession) -> Iterator[TestClient]:
    with TestClient(create_app(session, Access()), base_url="http://127.0.0.1:8765") as client:
        yield client


def first_vote(client: TestClient, **change: Any) -> dict[str, Any]:
    task = client.get("/api/next", params={"annotator": "ann"}).json()["tasks"][0]
    vote = {"id": "vote-0001", "annotator": "ann", "task": task["id"], "verdict": "choice", "shown": task["images"]}
    return {**vote, "choice": task["images"][0], "tags": {task["images"][1]: ["hands"]}, "seconds": 2.0, **change}


def test_a_vote_goes_round(client: TestClient, session: LabelSession) -> None:
    vote = first_vote(client)
    assert client.post("/api/votes", json=vote).json() == {"id": "vote-0001", "new": True}
    assert client.post("/api/votes", json=vote).json() == {"id": "vote-0001", "new": False}
    (kept,) = session.store.votes()
    assert kept.position == 0
    assert kept.shown == tuple(session.shown("ann", session.tasks[kept.task]))
    assert kept.tags == {kept.shown[1]: ("hands",)}
    after = client.get("/api/next", params={"annotator": "ann"}).json()
    assert (after["done"], after["total"], len(after["tasks"])) == (1, 6, 2)
    back = client.get("/api/back", params={"annotator": "ann", "before": after["tasks"][0]["id"]}).json()["task"]
    assert back["id"] == vote["task"]
    assert back["images"] == vote["shown"]
    assert back["given"] == {"verdict": "choice", "choice": vote["choice"], "tags": vote["tags"]}
    assert client.get("/api/back", params={"annotator": "bob"}).json() == {"task": None}


def test_the_page_learns_nothing_of_files(client: TestClient, session: LabelSession, tmp_path: Path) -> None:
    text = client.get("/api/next", params={"annotator": "ann"}).text
    assert "pictures" not in text
    assert str(tmp_path) not in text
    for image in client.get("/api/next", params={"annotator": "ann"}).json()["tasks"][0]["images"]:
        answer = client.get(f"/images/{image}")
        assert answer.headers["content-type"] == "image/png"
        assert answer.content[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "path",
    [
        "/images/../votes.db", "/images/..%2fvotes.db", "/images/pictures/0-0.png", "/images/pictures%2F0-0.png",
        "/images//etc/passwd", "/images/%2e%2e/%2e%2e/etc/passwd", "/page/../app.py", "/page/..%2fapp.py", "/votes.db",
        "/page/%2e%2e%2fstore.py", "/images/", "/tasks.jsonl", "/docs", "/openapi.json",
    ],
)  # fmt: skip
def test_no_path_leads_to_a_file(client: TestClient, path: str) -> None:
    assert client.get(path).status_code == 404


def test_a_foreign_file_in_the_table_is_not_served(client: TestClient, session: LabelSession, tmp_path: Path) -> None:
    name = next(iter(session.tasks.values())).images[0]
    (tmp_path / name).unlink()
    (tmp_path / name).symlink_to("/etc/passwd")
    assert client.get(f"/images/{session.picture_id(name)}").status_code == 404


def test_page_files_and_headers(client: TestClient) -> None:
    assert "diffalign label" in client.get("/").text
    for name, kind in PAGE_FILES.items():
        answer = client.get(f"/page/{name}")
        assert answer.headers["content-type"] == kind
        assert "default-src 'self'" in answer.headers["content-security-policy"]
    assert client.get("/api/session").json() == {"mode": "compare", "tags": ["hands", "unsafe"]}


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"verdict": "maybe"}, 422),
        ({"verdict": "tags", "choice": None}, 422),
        ({"choice": "no-such-image"}, 422),
        ({"choice": None}, 422),
        ({"shown": ["no-such-image"]}, 422),
        ({"task": "no-such-task"}, 422),
        ({"annotator": ""}, 422),
        ({"annotator": "x" * 65}, 422),
        ({"id": "short"}, 422),
        ({"seconds": -1}, 422),
        ({"tags": {"no-such-image": ["hands"]}}, 422),
    ],
)
def test_bad_votes_are_refused_and_not_kept(
    client: TestClient, session: LabelSession, change: dict[str, Any], status: int
) -> None:
    answer = client.post("/api/votes", json=first_vote(client, **change))
    assert answer.status_code == status
    assert answer.json()["detail"]
    assert session.store.count() == 0


def test_an_id_that_is_taken(client: TestClient) -> None:
    vote = first_vote(client)
    assert client.post("/api/votes", json=vote).status_code == 200
    assert client.post("/api/votes", json={**vote, "choice": vote["shown"][1]}).status_code == 409


def test_other_pages_of_the_browser_cannot_vote(client: TestClient, session: LabelSession) -> None:
    vote = first_vote(client)
    assert client.post("/api/votes", data=vote).status_code == 415
    assert client.post("/api/votes", content="{}", headers={"content-type": "text/plain"}).status_code == 415
    big = {**vote, "tags": {"x": ["y" * 70_000]}}
    assert client.post("/api/votes", json=big).status_code == 413
    # A name made to point to this machine (DNS rebinding).
    assert client.get("/api/session", headers={"host": "attacker.example:8765"}).status_code == 401
    assert client.get("/api/session", headers={"host": "localhost:8765"}).status_code == 200
    assert client.get("/api/session", headers={"host": "[::1]:8765"}).status_code == 200
    assert session.store.count() == 0


def test_the_token(session: LabelSession) -> None:
    with TestClient(create_app(session, Access(TOKEN)), base_url="http://10.0.0.5:8765") as client:
        for path in (
            "/",
            "/api/session",
            "/page/label.js",
            "/?token=wrong",
            "/images/x",
            f"/api/session?token={TOKEN}",
        ):
            assert client.get(path).status_code == 401, path
        assert client.post("/api/votes", json={}).status_code == 401
        assert client.get("/api/session", headers={"authorization": f"Bearer {TOKEN}"}).status_code == 200
        assert client.get("/api/session", headers={"authorization": "Bearer wörng".encode()}).status_code == 401
        entered = client.get(f"/?token={TOKEN}", follow_redirects=False)
        assert entered.status_code == 303
        assert entered.headers["location"] == "/"
        cookie = entered.headers["set-cookie"].lower()
        assert cookie.startswith(COOKIE)
        assert "httponly" in cookie
        assert "samesite=strict" in cookie
        assert client.get("/api/session").status_code == 200


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("box.lan", False)],
)
def test_which_addresses_are_this_machine(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback
