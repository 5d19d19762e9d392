"""The board keeps cells, compares them with the base, and knows which of them are out of date."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffalign.errors import UserError
from diffalign.evaluation.leaderboard.board import Board
from diffalign.evaluation.leaderboard.entries import BoardSettings, Cell
from diffalign.evaluation.leaderboard.keys import assets_hash, cell_key
from diffalign.evaluation.leaderboard.plots import mean_curve
from diffalign.evaluation.leaderboard.report import markdown, write_report
from diffalign.world.evaluation import PROXY

SETTINGS = BoardSettings(captions=4)
BASE_PROXY = [1.0, 2.0, 3.0, 4.0]
VERIFIER = [1.0, 0.0, 1.0, 0.0]
GRADED = [1.0, 0.5, 1.0, 0.5]


def board(folder: Path) -> Board:
    return Board(folder / "cells", folder / "runs", SETTINGS)


def put(where: Board, cell: Cell, proxy: list[float], draws: int = 1, **changes: Any) -> None:
    """Write a cell as a run would have."""
    scores = {PROXY: proxy, "verifier": VERIFIER * draws, "graded": GRADED * draws}
    content = {
        "cell": {"row": cell.row, "seed": cell.seed},
        "key": cell_key(cell, where.settings),
        "assets": assets_hash(cell.entry),
        "settings": where.settings.of(cell.entry),
        "draws": draws,
        "rewards": cell.entry.rewards,
        "outcome": "finished",
        "train_seconds": 10.0,
        "train_images": 64 if cell.entry.samples else 0,
        "kinds": ["colors", "colors", "counting", "counting"],
        "scores": {name: changes.pop(name, values) for name, values in scores.items()},
        "curve": [],
    }
    where.folder.mkdir(parents=True, exist_ok=True)
    where.path(cell).write_text(json.dumps({**content, **changes}))


def test_methods_are_compared_with_the_base(tmp_path: Path) -> None:
    shown = board(tmp_path)
    put(shown, Cell("base"), BASE_PROXY)
    put(shown, Cell("sft", 0), [2.0, 3.0, 4.0, 5.0])
    put(shown, Cell("sft", 1), [2.0, 3.0, 2.0, 3.0])
    rows = {row.name: row for row in shown.rows([Cell("base"), Cell("sft", 0), Cell("sft", 1), Cell("inpo", 0)])}
    assert set(rows) == {"base", "sft"}
    assert rows["sft"].seeds == 2
    assert rows["sft"].win_rate is not None
    assert rows["sft"].win_rate.value == pytest.approx(0.75)
    assert rows["sft"].by_kind == {"colors": 0.5, "counting": 0.5}
    assert rows["sft"].own is None
    assert rows["base"].verdict == "the start"
    assert not rows["sft"].older


def test_draws_are_paired_and_averaged_within_captions(tmp_path: Path) -> None:
    """Two draws of a caption that disagree are one caption without a change, not two captions."""
    shown = board(tmp_path)
    put(shown, Cell("base"), [*BASE_PROXY, 5.0, 6.0, 7.0, 8.0], draws=2)
    changes = [1.0, -1.0, 1.0, -1.0, -1.0, 1.0, -1.0, 1.0]
    proxy = [value + change for value, change in zip([*BASE_PROXY, 5.0, 6.0, 7.0, 8.0], changes, strict=True)]
    put(shown, Cell("ddpo"), proxy, draws=2, graded=[value + 0.1 for value in GRADED * 2])
    put(shown, Cell("sft"), [2.0, 3.0, 4.0, 5.0])  # one draw: compared with the first of the base
    rows = {row.name: row for row in shown.rows([Cell("base"), Cell("ddpo"), Cell("sft")])}
    assert rows["base"].means[PROXY] == pytest.approx(2.5)  # its first draw alone, beside rows of one draw
    rate, change = rows["ddpo"].win_rate, rows["ddpo"].changes[PROXY]
    assert rate is not None
    assert (rate.value, rate.low, rate.high) == (0.5, 0.5, 0.5)
    assert (change.value, change.low, change.high) == (0.0, 0.0, 0.0)
    assert rows["sft"].changes[PROXY].value == 1.0


def test_methods_with_a_reward_are_judged_by_it(tmp_path: Path) -> None:
    shown = board(tmp_path)
    put(shown, Cell("base"), BASE_PROXY * 2, draws=2)
    put(shown, Cell("ddpo"), [0.0] * 8, draws=2, graded=[value + 0.1 for value in GRADED * 2])
    put(shown, Cell("parrot"), [value + 1 for value in BASE_PROXY * 2], draws=2)
    put(shown, Cell("refl"), [value + 1 for value in BASE_PROXY * 2], draws=2, verifier=[0.0] * 8)
    rows = {row.name: row for row in shown.rows([Cell("ddpo"), Cell("parrot"), Cell("refl")])}
    assert rows["ddpo"].own is not None
    before, after, change = rows["ddpo"].own
    assert (before, after, change.low) == pytest.approx((0.75, 0.85, 0.1))
    assert rows["ddpo"].verdict == "rises"  # its reward does, though the proxy falls
    assert rows["parrot"].own is not None
    assert rows["parrot"].own[0] == pytest.approx(0.75 + 2.5)  # the sum of both
    assert rows["refl"].verdict == "rises; collapsed"
    table = markdown(list(rows.values()), SETTINGS)
    assert "| parrot | tiny-sd | 1 | graded + tiny-pickscore: 3.250 → 4.250 | +1.000 [+1.000, +1.000] |" in table
    assert "+0.100 [+0.100, +0.100]" in table


def test_runs_that_ended_early_are_shown_as_such(tmp_path: Path) -> None:
    shown = board(tmp_path)
    put(shown, Cell("base"), BASE_PROXY * 2, draws=2)
    why = "stopped: the loss of step 7 is not finite"
    put(shown, Cell("ddpo_10x", 0), [], outcome=why, scores={})
    put(shown, Cell("prdp_10x", 0), BASE_PROXY * 2, draws=2)
    put(shown, Cell("prdp_10x", 1), [], outcome=why, scores={})
    rows = {row.name: row for row in shown.rows([Cell("ddpo_10x"), Cell("prdp_10x"), Cell("prdp_10x", 1)])}
    assert (rows["ddpo_10x"].seeds, rows["ddpo_10x"].verdict) == (0, f"1 of 1 {why}")
    assert (rows["prdp_10x"].seeds, rows["prdp_10x"].verdict) == (1, f"undecided; 1 of 2 {why}")
    assert f"undecided; 1 of 2 {why} |" in markdown(list(rows.values()), SETTINGS)


def test_curves_are_averaged_over_seeds_at_each_step() -> None:
    one = [[step, 2.0 * step, 8.0 * step, float(step)] for step in range(1, 8)]
    other = [[step, 4.0 * step, 8.0 * step, step + 2.0] for step in range(1, 8)]
    seconds, rewards = mean_curve([one, other[:6]], 1)
    assert seconds == [3.0, 6.0, 9.0, 12.0, 15.0, 18.0, 14.0]
    assert rewards[:4] == [3.0, 3.5, 4.0, 5.0]
    assert mean_curve([one, other], 2)[0] == [8.0 * step for step in range(1, 8)]


def test_cells_of_older_code_are_shown_and_run_again(tmp_path: Path) -> None:
    shown = board(tmp_path)
    put(shown, Cell("base"), BASE_PROXY)
    put(shown, Cell("sft"), BASE_PROXY, key="of older code")
    assert not shown.is_current(Cell("sft"))
    row = shown.rows([Cell("sft")])[0]
    assert row.older
    assert "sft *" in markdown([row], SETTINGS)


@pytest.mark.parametrize("change", [{"assets": "others"}, {"settings": {"captions": 5}}])
def test_what_cannot_be_compared_is_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    shown = board(tmp_path)
    put(shown, Cell("base"), BASE_PROXY)
    put(shown, Cell("sft"), BASE_PROXY, **change)
    assert shown.rows([Cell("sft")]) == []


def test_a_board_without_a_base_says_what_to_run(tmp_path: Path) -> None:
    shown = board(tmp_path)
    with pytest.raises(UserError, match="base:0"):
        shown.rows([Cell("sft")])
    put(shown, Cell("sft"), BASE_PROXY)
    with pytest.raises(UserError, match="base:0"):
        shown.rows([Cell("sft")])


def test_the_published_cells_make_a_page(script: Any, tmp_path: Path) -> None:
    """A change of keys or of the files' form that would throw the published cells away is seen here."""
    pytest.importorskip("matplotlib")
    cells = Path(__file__).resolve().parents[2] / "docs" / "leaderboard"
    page = tmp_path / "page.md"
    answer = script("leaderboard", "--report_only", "true", "--folder", cells, "--report", page)
    assert answer.status == 0, answer.err
    lines = page.read_text().splitlines()
    assert [line for line in lines if line.startswith("| base")]
    assert len([line for line in lines if line.startswith("| ")]) > len(list(cells.glob("*-0-prompts0.json"))) / 2


def test_the_page_keeps_what_was_written_around_the_tables(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shown = board(tmp_path)
    put(shown, Cell("base"), BASE_PROXY * 2, draws=2)
    page = tmp_path / "board.md"
    write_report(shown.rows([Cell("base")]), SETTINGS, page, absent=["flow_grpo"])
    assert "not bundled: flow_grpo" in page.read_text()
    page.write_text(page.read_text() + "\n## Notes\n\nkept\n")
    curve = [[1, 2.0, 32, 0.5], [2, 4.0, 64, 0.6]]
    put(shown, Cell("ddpo"), BASE_PROXY * 2, draws=2, curve=curve)
    put(shown, Cell("sft"), [2.0, 3.0, 4.0, 5.0])
    write_report(shown.rows([Cell("base"), Cell("ddpo"), Cell("sft")]), SETTINGS, page)
    text = page.read_text()
    assert "| base | 1 | 0.500 | 2.500 |" in text  # compared with nothing: no interval
    assert "kept" in text
    assert "| sft | 1 |" in text
    assert "not bundled" not in text
    assert page.with_suffix(".png").stat().st_size > 1000
    assert (tmp_path / "board_curves.png").stat().st_size > 1000
