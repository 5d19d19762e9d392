"""VBench's totals of raw scores: ``python eval/vbench.py --raw FILE``."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.errors import UserError


def vbench(raw: Path, output: Path | None = None) -> int:
    """Normalise and weigh the sixteen dimensions.

    Args:
        raw: JSON object, dimension -> raw score in [0, 1].
        output: JSON file for the figures.
    """
    from diffalign.evaluation.vbench import summarise
    from diffalign.records import read_json, sha256_of, write_json

    scores = read_json(raw)
    if not isinstance(scores, dict) or not all(isinstance(value, int | float) for value in scores.values()):
        raise UserError(f"{raw}: expected an object, dimension -> number")
    summary = summarise(scores)
    sys.stdout.write(
        f"quality {summary.quality:.4f}, semantic {summary.semantic:.4f}, total {summary.total:.4f}\n"
        + (f"not given, counted as raw 0: {', '.join(summary.missing)}\n" if summary.missing else "")
    )
    if output is not None:
        write_json(output, {"benchmark": "vbench", "raw_sha256": sha256_of(raw), "raw": scores, **asdict(summary)})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(vbench, as_positional=False)))
