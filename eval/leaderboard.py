"""Train and score every method on the bundled world: ``python eval/leaderboard.py``.

One cell: ``--only '[inpo:0]'``. What is done already is kept (``--folder``); the table and the plot go to ``docs/``.
"""

from __future__ import annotations

from pathlib import Path

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.evaluation.board_report import write_report
from diffalign.evaluation.leaderboard import BASE, BEST_OF_4, Board, BoardSettings, Cell, board_methods
from diffalign.world.evaluation import world_evaluator


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
    """Run the cells that are missing and write the report.

    Args:
        only: cells METHOD:SEED; all by default.
        seeds: training seeds of each method.
        test_prompt_seed: other seeds draw other test captions.
        captions: number of test captions.
        folder: one JSON file a cell.
        runs: training runs, one folder a cell.
        report: markdown file; the plot goes beside it.
        report_only: write the report of the cells that are there, and run nothing.
    """
    methods = board_methods()
    every = [Cell(BASE, 0), Cell(BEST_OF_4, 0), *(Cell(name, seed) for name in methods for seed in range(seeds))]
    cells = [Cell.parse(text) for text in only] if only else every
    board = Board(folder, runs, BoardSettings(test_prompt_seed=test_prompt_seed, captions=captions))
    if not report_only:
        board.fill([Cell(BASE, 0), *cells], lambda: world_evaluator("test", captions, test_prompt_seed))
    write_report(board.rows(dict.fromkeys([*every, *cells])), board.settings, report)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(leaderboard, as_positional=False)))
