"""UniGenBench from a judge's answers: ``python eval/unigenbench.py --answers FILE --judge NAME``."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.errors import UserError
from diffalign.records import read_jsonl, sha256_of, write_json


def unigenbench(answers: Path, judge: str, output: Path | None = None) -> int:
    """Summarise judgements by dimension.

    Args:
        answers: .csv or .jsonl, one row an image, with testpoint and result_json as the official script writes them.
        judge: name of the model that judged.
        output: JSON file for the figures.
    """
    from diffalign.evaluation.unigenbench import as_dict, summarise

    summary = summarise(_rows(answers))
    lines = [
        f"{name.strip()}: {part.accuracy:.4f} ({part.correct} of {part.total})"
        for name, part in summary.primary.items()
    ]
    sys.stdout.write("\n".join([f"unigenbench ({judge}): {summary.overall:.4f}", *lines]) + "\n")
    sys.stdout.write(f"{summary.failed} rows without a readable judgement\n")
    if output is not None:
        record = {"benchmark": "unigenbench", "judge": judge, "answers_sha256": sha256_of(answers)}
        write_json(output, {**record, **as_dict(summary)})
    return 0


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    if path.suffix != ".csv":
        return read_jsonl(path, ("testpoint",))
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(unigenbench, as_positional=False)))
