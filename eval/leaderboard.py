"""Train and score every method on the bundled world: ``python eval/leaderboard.py``.

One cell: ``--only '[inpo:0]'``. What is done already is kept (``--folder``); the table and the plot go to ``docs/``.
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.evaluation.leaderboard.board import Board
from diffalign.evaluation.leaderboard.cells import board_evaluator
from diffalign.evaluation.leaderboard.entries import BoardSettings, Cell, entries
from diffalign.evaluation.leaderboard.report import write_report


def leaderboard(
    only: list[str] | None = None,
    seeds: int = 3,
    test_prompt_seed: int = 0,
    captions: int = 400,
    folder: Path = Path("docs/leaderboard"),
    runs: Path = Path("runs/leaderboard"),
    report: Path = Path("docs/leaderboard.md"),
    report_only: bool = False,
) -> int:
    """Run the cells that are missing and write the report; rows whose model is not bundled are left out.

    Args:
        only: cells ROW:SEED, where a row is a method, a baseline or a variant; all by default.
        seeds: training seeds of each method.
        test_prompt_seed: other seeds draw other test captions.
        captions: number of test captions.
        folder: one JSON file a cell.
        runs: training runs, one folder a cell.
        report: markdown file; plots go beside it.
        report_only: write the report of the cells that are there, and run nothing.
    """
    rows = entries()
    every = [Cell(name, seed) for name, entry in rows.items() for seed in range(seeds if entry.method else 1)]
    here = [cell for cell in every if cell.entry.available]
    chosen = [Cell.parse(text) for text in only] if only else here
    board = Board(folder, runs, BoardSettings(test_prompt_seed=test_prompt_seed, captions=captions))
    if not report_only:
        board.fill(chosen, lambda: board_evaluator(board.settings))
    absent = [name for name, entry in rows.items() if not entry.available]
    write_report(board.rows(dict.fromkeys([*here, *chosen])), board.settings, report, absent)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(leaderboard, as_positional=False)))
