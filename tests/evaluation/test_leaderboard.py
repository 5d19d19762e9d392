"""The board keeps cells, compares them with the base, and knows which of them are out of date."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from diffalign.errors import UserError
from diffalign.evaluation import leaderboard
from diffalign.evaluation.board_report import markdown, write_report
from diffalign.evaluation.leaderboard import Board, BoardSettings, Cell

SETTINGS = BoardSettings(captions=4)
BASE_PROXY = [1.0, 2.0, 3.0, 4.0]


def board(folder: Path) -> Board:
    return Board(folder / "cells", folder / "runs", SETTINGS)


def put(where: Board, cell: Cell, proxy: list[float], **changes: Any) -> None:
    """Write a cell as a run would have."""
    content = {
        "cell": asdict(cell),
        "key": leaderboard.cell_key(cell, where.settings),
        "assets": leaderboard.assets_hash(),
        "settings": asdict(where.settings),
        "train_seconds": 10.0,
        "kinds": ["colors", "colors", "counting", "counting"],
        "scores": {"proxy": proxy, "verifier": [1.0, 0.0, 1.0, 0.0], "graded": [1.0, 0.5, 1.0, 0.5]},
    }
    where.folder.mkdir(parents=True, exist_ok=True)
    where.path(cell).write_text(json.dumps({**content, **changes}))


def test_methods_are_compared_with_the_base(tmp_path: Path) -> None:
    shown = board(tmp_path)
    put(shown, Cell("base", 0), BASE_PROXY)
    put(shown, Cell("sft", 0), [2.0, 3.0, 4.0, 5.0])
    put(shown, Cell("sft", 1), [2.0, 3.0, 2.0, 3.0])
    rows = {row.method: row for row in shown.rows([Cell("base", 0), Cell("sft", 0), Cell("sft", 1), Cell("inpo", 0)])}
    assert set(rows) == {"base", "sft"}
    assert rows["sft"].seeds == 2
    assert rows["sft"].win_rate.value == pytest.approx(0.75)
    assert rows["sft"].by_kind == {"colors": 0.5, "counting": 0.5}
    assert rows["base"].verdict == "the start"
    assert not rows["sft"].older


def test_cells_of_older_code_are_shown_and_run_again(tmp_path: Path) -> None:
    shown = board(tmp_path)
    put(shown, Cell("base", 0), BASE_PROXY)
    put(shown, Cell("sft", 0), BASE_PROXY, key="of older code")
    assert not shown.is_current(Cell("sft", 0))
    row = shown.rows([Cell("sft", 0)])[0]
    assert row.older
    assert "sft *" in markdown([row], SETTINGS)


@pytest.mark.parametrize("change", [{"assets": "others"}, {"settings": {**asdict(SETTINGS), "captions": 5}}])
def test_what_cannot_be_compared_is_left_out(tmp_path: Path, change: dict[str, Any]) -> None:
    shown = board(tmp_path)
    put(shown, Cell("base", 0), BASE_PROXY)
    put(shown, Cell("sft", 0), BASE_PROXY, **change)
    assert shown.rows([Cell("sft", 0)]) == []


def test_a_board_without_a_base_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="base:0"):
        board(tmp_path).rows([Cell("sft", 0)])


@pytest.mark.parametrize(("text", "complaint"), [("spt:0", "sft"), ("sft:zero", "METHOD:SEED")])
def test_mistyped_cells(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Cell.parse(text)


def test_the_page_keeps_what_was_written_around_the_table(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    shown = board(tmp_path)
    put(shown, Cell("base", 0), BASE_PROXY)
    page = tmp_path / "board.md"
    write_report(shown.rows([Cell("base", 0)]), SETTINGS, page)
    page.write_text(page.read_text() + "\n## Notes\n\nkept\n")
    put(shown, Cell("sft", 0), [2.0, 3.0, 4.0, 5.0])
    write_report(shown.rows([Cell("base", 0), Cell("sft", 0)]), SETTINGS, page)
    text = page.read_text()
    assert "kept" in text
    assert "| sft | 1 |" in text
    assert page.with_suffix(".png").stat().st_size > 1000
