"""Compare models on one page: ``python eval/report.py base=images/base sft=images/sft sft=runs/sft-001``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from diffalign.cli.main import run_command


def report(argv: Sequence[str]) -> int:
    """Write report.html, report.md and PNG plots.

    Raises:
        UserError: for sources that cannot be read or compared.
    """
    parser = ArgumentParser(prog="eval/report.py", description="Compare models on the same captions and seeds.")
    parser.add_argument(
        "sources",
        nargs="+",
        type=str,
        help="NAME=PATH, any number a name: folder of images, file of scores, folder of a training run; "
        "the first model is what the others are measured against",
    )
    parser.add_argument("--output", type=Path, default=Path("report"), help="folder to write to")
    parser.add_argument("--title", type=str, default="Comparison", help="heading of the page")
    parser.add_argument("--captions", type=int, default=24, help="rows of the image grid")
    parser.add_argument("--side", type=int, default=320, help="largest side of an image on the page, in pixels")
    parser.add_argument("--tie_margin", type=float, default=0.0, help="differences of scores that count as ties")
    parser.add_argument(
        "--allow_differences", type=bool, default=False, help="compare although seeds or sampling settings differ"
    )
    options = parser.parse_args(list(argv))
    from diffalign.evaluation.report.entries import read_entries
    from diffalign.evaluation.report.write import ReportOptions, write_report

    shown = ReportOptions(options.title, options.captions, options.side, options.tie_margin, options.allow_differences)
    page = write_report(read_entries(options.sources), options.output, shown)
    sys.stdout.write(f"{page} ({page.stat().st_size / 2**20:.1f} MiB)\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: report(sys.argv[1:])))
