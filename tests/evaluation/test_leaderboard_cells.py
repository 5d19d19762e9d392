"""A cell trains, samples and scores; what goes wrong in a run is its result, what goes wrong around it is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.errors import RunStopped, UserError
from diffalign.evaluation.leaderboard import cells
from diffalign.evaluation.leaderboard.board import Board
from diffalign.evaluation.leaderboard.cells import draw, run_cell, train_cell
from diffalign.evaluation.leaderboard.entries import VARIANTS, BoardSettings, Cell, Entry
from diffalign.training.loop import RunResult
from diffalign.world.evaluation import PROXY, world_evaluator

SETTINGS = BoardSettings(captions=2, num_steps=2)
SMALL = {
    "max_train_steps": 4,
    "train_batch_size": 1,
    "images_per_prompt": 2,
    "rollout_steps": 2,
    "updates_per_rollout": 2,
    "logging_steps": 1,
    "rank": 2,
    "max_train_samples": 4,
}
CELL = Cell("small")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(VARIANTS, "small", Entry("ddpo", options=SMALL))


class Fit:
    """A run that ends as told."""

    def __init__(self, end: Any) -> None:
        self.end = end

    def fit(self) -> RunResult:
        if isinstance(self.end, Exception):
            raise self.end
        return RunResult(Path(), 1, interrupted=self.end)


def test_a_cell_trains_draws_twice_and_keeps_its_curve(tmp_path: Path) -> None:
    board, made = Board(tmp_path / "cells", tmp_path / "runs", SETTINGS), []

    def evaluator() -> Any:
        made.append(1)
        return world_evaluator("test", 2)

    board.fill([CELL], evaluator)
    content, base = board.load(CELL), board.load(Cell("base"))
    assert content is not None
    assert base is not None
    assert (content["outcome"], content["draws"], content["rewards"]) == ("finished", 2, {"graded": 1.0})
    assert len(content["scores"][PROXY]) == len(base["scores"][PROXY]) == 4
    assert base["scores"][PROXY][:2] != base["scores"][PROXY][2:]
    assert [point[0] for point in content["curve"]] == [1, 2, 3, 4]
    assert [point[2] for point in content["curve"]] == [2, 2, 4, 4]  # two updates of each rollout
    assert content["curve"][0][1] < content["curve"][3][1] == pytest.approx(content["train_seconds"], abs=0.1)
    assert content["train_images"] == 4
    board.fill([CELL], evaluator)
    assert made == [1]  # nothing was missing


def test_the_first_draw_is_that_of_one_draw_and_the_best_is_kept() -> None:
    evaluator = world_evaluator("test", 2)
    one, two, best = (
        draw("tiny-sd", evaluator, draws, best_of, num_steps=1, guidance_scale=1.0)
        for draws, best_of in ((1, 1), (2, 1), (1, 2))
    )
    assert torch.equal(two[PROXY][:2], one[PROXY])
    assert torch.equal(best[PROXY], torch.maximum(two[PROXY][:2], two[PROXY][2:]))


def test_a_stopped_run_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "build_run", lambda config: Fit(RunStopped("step 3 is not finite; see /a/path")))
    content = run_cell(CELL, SETTINGS, world_evaluator("test", 2), tmp_path / "run")
    assert content["outcome"] == "stopped: step 3 is not finite"
    assert (content["scores"], content["curve"]) == ({}, ())


def test_images_that_are_no_numbers_are_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cells, "draw", lambda *_, **__: {PROXY: torch.tensor([1.0, torch.nan])})
    content = run_cell(Cell("base"), SETTINGS, world_evaluator("test", 2), tmp_path / "run")
    assert content["outcome"].startswith("collapsed")
    assert content["scores"] == {}


def test_interrupted_runs_and_full_disks_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for end, message in (("SIGTERM", "goes on with small:0"), (UserError("no space"), "no space")):
        monkeypatch.setattr(cells, "build_run", lambda config, end=end: Fit(end))
        with pytest.raises(UserError, match=message):
            train_cell(CELL, tmp_path / "run")


def test_a_run_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resumed: list[str | None] = []

    def build(config: Any) -> Fit:
        resumed.append(config.run.resume_from_checkpoint)
        return Fit(None)

    monkeypatch.setattr(cells, "build_run", build)
    (tmp_path / "run" / "half").mkdir(parents=True)
    train_cell(CELL, tmp_path / "run")
    assert not (tmp_path / "run").exists()  # killed before its first checkpoint
    (tmp_path / "run" / "checkpoints" / "step-00000002").mkdir(parents=True)
    train_cell(CELL, tmp_path / "run")
    assert resumed == [None, "latest"]
