"""``diffalign methods``: the registry as a table."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from diffalign.strategies.registry import Method, list_methods


def needs_of(method: Method) -> str:
    """Say in words what a method needs besides its data."""
    spec = method.strategy.spec
    needs = ["reference"] if spec.needs_reference else []
    if spec.needs_reward:
        needs.append("differentiable reward" if spec.needs_reward == "differentiable" else "reward")
    return ", ".join([*needs, *spec.frozen_policies]) or "nothing"


def records() -> list[dict[str, str]]:
    """Return one flat record a method, for tables, JSON and the generated documentation."""
    return [
        {
            "name": m.name,
            "modality": m.strategy.spec.modality,
            "family": m.family,
            "data": m.strategy.spec.data.replace("_", " "),
            "needs": needs_of(m),
            "summary": m.summary,
            "paper": m.paper,
            "repository": m.repository,
        }
        for m in list_methods()
    ]


def methods_command(argv: Sequence[str]) -> int:
    """Print every registered method."""
    parser = ArgumentParser(prog="diffalign methods", description="List every method.")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(list(argv))
    if options.json:
        sys.stdout.write(json.dumps(records(), indent=1) + "\n")
        return 0
    table = Table(title="methods", show_lines=False)
    for column in ("method", "modality", "data", "needs", "what it does", "paper"):
        table.add_column(column, overflow="fold")
    for r in records():
        table.add_row(r["name"], r["modality"], r["data"], r["needs"], r["summary"], r["paper"])
    Console().print(table)
    return 0
