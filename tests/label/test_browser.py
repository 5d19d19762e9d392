"""A session of labelling in a real browser, from the first key to training on the export."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import diffalign
from diffalign.label.export import export_votes
from diffalign.label.session import LabelSession
from tests.docs.documents import SHORT
from tests.label.support import make_session, running
from tests.label.webdriver import CHROMIUM, DRIVER, MISSING, Browser, browser

pytestmark = [pytest.mark.browser, pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)]


def enter(window: Browser, port: int, name: str) -> None:
    """Open the app and say who one is."""
    window.open(f"http://127.0.0.1:{port}/")
    window.wait("!document.getElementById('welcome').hidden")
    window.type("#name", name)
    window.press("Enter")
    ready(window, 0)


def ready(window: Browser, done: int) -> None:
    """Wait until so many tasks are answered and the next can be."""
    window.wait(
        f"document.getElementById('count').textContent.startsWith('{done} of') && "
        "(!document.getElementById('skip').disabled || !document.getElementById('end').hidden)"
    )


def prompt(window: Browser) -> str:
    return str(window.run("return document.getElementById('prompt').textContent"))


def answers(session: LabelSession, name: str) -> list[tuple[str, str, int | None]]:
    """(caption, verdict, place of the choice) of an annotator's votes, in their order."""
    votes = [vote for vote in session.store.votes() if vote.annotator == name]
    return [(session.tasks[vote.task].prompt, vote.verdict, vote.position) for vote in votes]


def test_two_annotators_label_and_a_method_trains_on_it(tmp_path: Path) -> None:
    session = make_session(tmp_path, tasks=5, size=64)
    with running(session) as port, browser(tmp_path / "profile") as window:
        enter(window, port, "ann")
        first = prompt(window)
        window.press("1")
        ready(window, 1)
        second = prompt(window)
        window.press("Right")
        ready(window, 2)
        third = prompt(window)

        ann = window.tab()
        bob = window.new_tab()
        enter(window, port, "bob")
        window.press("2")
        ready(window, 1)

        window.switch(ann)
        window.reload()
        ready(window, 2)
        assert prompt(window) == third
        window.press("d")
        window.press("Shift", "1")
        assert window.run("return document.querySelectorAll('.mark[aria-pressed=true]').length") == 1
        window.press("t")
        ready(window, 3)
        window.press("b")
        window.wait(f"document.getElementById('prompt').textContent === {json.dumps(third)}")
        window.wait("!document.getElementById('skip').disabled")
        window.run("document.querySelectorAll('.card')[1].click()")
        window.wait(f"document.getElementById('prompt').textContent !== {json.dumps(third)}")
        ready(window, 3)
        window.press("s")
        ready(window, 4)
        window.press("1")
        ready(window, 5)
        window.wait("!document.getElementById('end').hidden")

        window.switch(bob)
        for done in range(2, 6):
            window.press("1")
            ready(window, done)

    assert answers(session, "ann")[:3] == [(first, "choice", 0), (second, "choice", 1), (third, "choice", 1)]
    assert [verdict for _, verdict, _ in answers(session, "ann")[3:]] == ["skip", "choice"]
    assert [place for _, _, place in answers(session, "bob")] == [1, 0, 0, 0, 0]
    marked = next(vote for vote in session.store.votes() if session.tasks[vote.task].prompt == third)
    assert marked.tags == {marked.shown[0]: ("unsafe",)}
    assert session.store.count() == 11  # one answer was changed

    export_votes(session.store, tmp_path / "pairs.jsonl", "votes")
    result = diffalign.train(
        str(tmp_path / "pairs.jsonl"), method="diffusion_dpo", output_dir=str(tmp_path / "run"), **SHORT
    )
    assert (result.folder / "pytorch_lora_weights.safetensors").is_file()


def test_a_vote_waits_for_a_server_that_is_away(tmp_path: Path) -> None:
    session = make_session(tmp_path, tasks=2)
    with browser(tmp_path / "profile") as window:
        with running(session) as port:
            enter(window, port, "ann")
        window.press("1")
        window.wait("document.getElementById('notice').textContent.includes('does not answer')")
        assert session.store.count() == 0
        with running(session, port=port):
            ready(window, 1)
            window.wait("document.getElementById('notice').hidden")
    assert session.store.count() == 1


def test_marking_defects_of_seven_images(tmp_path: Path) -> None:
    session = make_session(tmp_path, tasks=1, images=7, mode="tag")
    with running(session) as port, browser(tmp_path / "profile") as window:
        enter(window, port, "ann")
        window.press("3")
        window.press("7")
        window.press("7")
        window.press("d")
        window.press("5")
        window.press("Enter")
        ready(window, 1)
    (vote,) = session.store.votes()
    assert vote.verdict == "tags"
    assert vote.tags == {vote.shown[2]: ("hands",), vote.shown[4]: ("unsafe",)}
