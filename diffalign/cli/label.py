"""``diffalign label``: collect human preferences in a browser, look at their agreement, export them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from jsonargparse import ArgumentParser

from diffalign.errors import MissingExtra, unknown

_USAGE = """usage: diffalign label serve SOURCE [--votes votes.db] [options]
       diffalign label agreement VOTES
       diffalign label export VOTES --output pairs.jsonl [options]
"""


def label_command(argv: Sequence[str]) -> int:
    """Serve the labelling app, or work on the votes that it collected.

    Raises:
        UserError: for an unknown action, a source that cannot be read, or a file that holds no votes.
    """
    if not argv or argv[0] in {"-h", "--help"}:
        sys.stdout.write(_USAGE)
        return 0 if argv else 2
    if argv[0] not in _ACTIONS:
        raise unknown("action of label", argv[0], _ACTIONS)
    return _ACTIONS[argv[0]](argv[1:])


def _serve(argv: Sequence[str]) -> int:
    from diffalign.label.votes import DEFAULT_TAGS

    parser = ArgumentParser(prog="diffalign label serve", description="Serve the labelling app until Ctrl-C.")
    parser.add_argument("source", type=str, help="folder of images, annotation file, any data source, or 'bundled'")
    parser.add_argument(
        "--votes", type=Path, default=Path("votes.db"), help="SQLite file for the votes; made or continued"
    )
    parser.add_argument(
        "--mode", choices=["compare", "tag"], default="compare", help="choose the best, or mark defects"
    )
    parser.add_argument("--images_per_task", type=int, default=2, help="where the source has one image a row: 1 to 9")
    parser.add_argument("--tags", type=list[str], default=list(DEFAULT_TAGS), help="defects that can be marked")
    parser.add_argument(
        "--votes_per_task", type=int, default=0, help="annotators wanted for each task; 0: all who come"
    )
    parser.add_argument("--limit", type=int, default=0, help="use only so many tasks; 0 for all")
    parser.add_argument("--seed", type=int, default=0, help="of the random orders of tasks and images")
    parser.add_argument(
        "--host", type=str, default="127.0.0.1", help="address to listen on; others than this need a token"
    )
    parser.add_argument("--port", type=int, default=8765, help="port; 0 for a free one")
    parser.add_argument("--token", type=str | None, default=None, help="asked of everyone; made up where it is needed")
    parser.add_argument("--column_map", type=dict[str, str], default={}, help="canonical column: column of the source")
    parser.add_argument("--default_prompt", type=str | None, default=None, help="caption of images without a text file")
    options = parser.parse_args(list(argv))
    try:
        from diffalign.label.serve import serve
    except ImportError as error:
        raise MissingExtra(error.name or "fastapi", "app", "the labelling app") from error
    from diffalign.data.readers import SourceOptions
    from diffalign.label.collect import collect_tasks
    from diffalign.label.session import LabelSession
    from diffalign.label.store import SessionSettings, VoteStore

    reading = SourceOptions(column_map=options.column_map, default_prompt=options.default_prompt)
    unpacked = options.votes.with_name(options.votes.stem + "_images")
    found = collect_tasks(options.source, unpacked, options.images_per_task, options.limit, reading)
    for reason, count in found.notes.items():
        sys.stdout.write(f"{count} {reason}\n")
    settings = SessionSettings(str(found.root), options.mode, tuple(options.tags), options.seed)
    store = VoteStore(options.votes, create=True)
    store.begin(settings, found.tasks)
    serve(LabelSession(store, settings, found.tasks, options.votes_per_task), options.host, options.port, options.token)
    return 0


def _agreement(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="diffalign label agreement", description="Say who voted and how far they agree.")
    parser.add_argument("votes", type=Path, help="the file of votes")
    options = parser.parse_args(list(argv))
    from diffalign.label.agreement import agreement
    from diffalign.label.store import VoteStore

    store = VoteStore(options.votes)
    report = agreement(store.votes(), store.tasks(), store.settings().mode)
    sys.stdout.write("\n".join(report.lines()) + "\n")
    return 0


def _export(argv: Sequence[str]) -> int:
    parser = ArgumentParser(prog="diffalign label export", description="Write votes as rows that training reads.")
    parser.add_argument("votes", type=Path, help="the file of votes")
    parser.add_argument("--output", type=Path, default=Path("pairs.jsonl"), help="JSONL file to write")
    parser.add_argument("--rows", choices=["tasks", "votes"], default="tasks", help="a row for each task, or each vote")
    options = parser.parse_args(list(argv))
    from diffalign.label.export import export_votes
    from diffalign.label.store import VoteStore

    written = export_votes(VoteStore(options.votes), options.output, options.rows)
    sys.stdout.write(f"{options.output}: " + ", ".join(f"{count} {what}" for what, count in written.items()) + "\n")
    return 0


_ACTIONS: Mapping[str, Callable[[Sequence[str]], int]] = {
    "serve": _serve,
    "agreement": _agreement,
    "export": _export,
}
