"""The files of the board: one JSON file a cell, keyed by hashes of code, configuration, assets and test settings.

What has not changed is not run again, and an interrupted board goes on where it stopped. Cells of older code stay on
the board, marked, until they are run again; those of other assets or settings cannot be compared and are left out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.evaluation.evaluator import ImageEvaluator
from diffalign.evaluation.leaderboard.cells import run_cell
from diffalign.evaluation.leaderboard.comparison import Row, compare
from diffalign.evaluation.leaderboard.entries import BASE, BoardSettings, Cell, entries
from diffalign.evaluation.leaderboard.keys import assets_hash, cell_key
from diffalign.records import read_json, write_text


class Board:
    """The files of a board.

    Args:
        folder: where the cells' files are kept.
        runs: where training runs go.
        settings: what is measured.
    """

    def __init__(self, folder: Path, runs: Path, settings: BoardSettings) -> None:
        self.folder, self.runs, self.settings = folder, runs, settings

    def path(self, cell: Cell) -> Path:
        """File of a cell."""
        return self.folder / f"{cell.row}-{cell.seed}-prompts{self.settings.test_prompt_seed}.json"

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """Return a cell's content if it is there and was measured with these assets and settings.

        Raises:
            UserError: for a damaged file.
        """
        path, entry = self.path(cell), cell.entry
        if not path.is_file() or not entry.available:
            return None
        content: dict[str, Any] = read_json(path)
        same = content["assets"] == assets_hash(entry) and content["settings"] == self.settings.of(entry)
        return content if same else None

    def is_current(self, cell: Cell) -> bool:
        """Whether the cell is there and nothing that it depends on, code included, has changed since."""
        content = self.load(cell)
        return content is not None and content["key"] == cell_key(cell, self.settings)

    def fill(self, cells: Iterable[Cell], make_evaluator: Callable[[], ImageEvaluator]) -> None:
        """Run the cells that are missing, one at a time, bases first; each file appears whole or not at all.

        Raises:
            UserError: for runs that cannot start, or that were interrupted.
        """
        cells = list(cells)
        bases = [Cell(cell.entry.base) for cell in cells]
        missing = [cell for cell in dict.fromkeys([*bases, *cells]) if not self.is_current(cell)]
        evaluator = make_evaluator() if missing else None
        for cell in missing:
            assert evaluator is not None
            run_folder = self.runs / f"{cell.row}-{cell.seed}-{cell_key(cell, self.settings)}"
            write_text(self.path(cell), json.dumps(run_cell(cell, self.settings, evaluator, run_folder)))

    def rows(self, cells: Iterable[Cell]) -> list[Row]:
        """Compare every row that has files with its base.

        Raises:
            UserError: if that base has no file.
        """
        contents: dict[str, list[dict[str, Any]]] = {}
        older = set()
        for cell in cells:
            content = self.load(cell)
            if content is not None:
                contents.setdefault(cell.row, []).append(content)
                older |= set() if self.is_current(cell) else {cell.row}
        known = entries()
        bases = {known[name].base: self.load(Cell(known[name].base)) for name in contents or (BASE,)}
        if lacking := [name for name, content in bases.items() if content is None]:
            raise UserError(f"the board has no row {lacking[0]!r} yet: run it with --only '[{lacking[0]}:0]'")
        return [
            compare(name, known[name], runs, bases[known[name].base] or {}, name in older)
            for name, runs in contents.items()
        ]
