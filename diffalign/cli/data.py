"""``diffalign data check``: look a data set over before training on it."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import get_args

from jsonargparse import ArgumentParser

from diffalign.errors import UserError, nearest
from diffalign.strategies.base import DataKind


def data_command(argv: Sequence[str]) -> int:
    """Check a data set; status 0 when training would accept it, else 1.

    Raises:
        UserError: for an unknown action, or a source that cannot be opened.
    """
    actions = ("check",)
    if not argv or argv[0] in {"-h", "--help"}:
        sys.stdout.write("usage: diffalign data check SOURCE --kind KIND [options]\n")
        return 0 if argv else 2
    if argv[0] not in actions:
        raise UserError(f"unknown action {argv[0]!r} on data: {nearest(argv[0], actions)}")
    parser = ArgumentParser(prog="diffalign data check", description="Read every row and every image of a data set.")
    parser.add_argument("source", type=str, help="file, folder, hub name, or 'bundled'")
    parser.add_argument(
        "--kind", type=str, default="pairs", help=f"what it should serve as: {', '.join(get_args(DataKind))}"
    )
    parser.add_argument("--data_format", type=str, default="auto", help="how the source is laid out")
    parser.add_argument("--train_split", type=str, default="train", help="split to read")
    parser.add_argument("--column_map", type=dict[str, str], default={}, help="canonical column: column of the source")
    parser.add_argument("--default_prompt", type=str, default=None, help="caption of pictures without a text file")
    options = parser.parse_args(list(argv[1:]))
    from diffalign.data.check import check_dataset
    from diffalign.data.readers import SourceOptions

    report = check_dataset(
        options.source,
        options.kind,
        SourceOptions(
            split=options.train_split,
            data_format=options.data_format,
            column_map=options.column_map,
            default_prompt=options.default_prompt,
        ),
    )
    sys.stdout.write("\n".join(report.lines()) + "\n")
    return 0 if report.ok else 1
