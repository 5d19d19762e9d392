"""Agreement of annotators, against the textbook's example and limit cases."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.label.agreement import agreement, krippendorff_alpha, raw_agreement
from tests.label.support import make_session, make_vote

# Krippendorff, "Computing Krippendorff's Alpha-Reliability" (2011), example C: four observers, twelve units, gaps.
OBSERVERS = ("1 2 3 3 2 1 4 1 2 . . .", "1 2 3 3 2 2 4 1 2 5 . 3", ". 3 3 3 2 3 4 2 2 5 1 .", "1 2 3 3 2 4 4 1 2 5 1 .")


def test_alpha_of_the_textbook() -> None:
    units = [[value for value in unit if value != "."] for unit in zip(*map(str.split, OBSERVERS), strict=True)]
    assert krippendorff_alpha(units) == pytest.approx(0.743, abs=5e-4)


def test_alpha_at_its_limits() -> None:
    assert krippendorff_alpha([[0, 0], [1, 1], [None, None]]) == 1
    assert krippendorff_alpha([[0, 0], [0, 0]]) is None
    assert krippendorff_alpha([[0], [1]]) is None
    assert krippendorff_alpha([]) is None
    assert krippendorff_alpha([[0, 1]] * 50) == pytest.approx(-0.98)
    chance = krippendorff_alpha([[0, 0], [0, 1], [1, 0], [1, 1]] * 100)
    assert chance == pytest.approx(0, abs=0.01)


def test_raw_agreement() -> None:
    assert raw_agreement([["a", "a", "b"], ["a"], ["b", "b"]]) == pytest.approx((2 + 2) / (6 + 2))
    assert raw_agreement([["a"]]) is None


def test_the_report_of_a_session(tmp_path: Path) -> None:
    session = make_session(tmp_path, tasks=4)
    for index, task in enumerate(session.tasks):
        session.submit(make_vote(f"ann-{index:04}", task, 0, seconds=2.0))
        session.submit(make_vote(f"bob-{index:04}", task, int(index == 3), annotator="bob", shown=(1, 0), seconds=4.0))
    session.submit(make_vote("ann-again", next(iter(session.tasks)), None, verdict="skip"))
    report = agreement(session.store.votes(), list(session.tasks.values()), "compare")
    assert report.verdicts == {"ann": {"choice": 3, "skip": 1}, "bob": {"choice": 4}}
    assert report.shared == 3
    assert report.raw == pytest.approx(2 / 3)
    assert report.leftmost is not None
    assert report.leftmost.value == pytest.approx(4 / 7)
    assert report.by_chance == 0.5
    assert any("Krippendorff's alpha (nominal) 0.000" in line for line in report.lines())


def test_tagging_is_judged_image_by_image(tmp_path: Path) -> None:
    session = make_session(tmp_path, tasks=1, mode="tag")
    (task,) = session.tasks
    for name, tags in (("ann", {0: ("hands",)}), ("bob", {0: ("unsafe",)})):
        session.submit(make_vote(f"vote-{name}", task, None, name, "tags", tags=tags))
    report = agreement(session.store.votes(), list(session.tasks.values()), "tag")
    assert (report.shared, report.alpha, report.raw, report.leftmost) == (2, 1, 1, None)


def test_a_session_without_overlap_says_so(tmp_path: Path) -> None:
    session = make_session(tmp_path)
    report = agreement([make_vote("vote-0001", next(iter(session.tasks)))], list(session.tasks.values()), "compare")
    assert any("nothing was judged by two" in line for line in report.lines())
