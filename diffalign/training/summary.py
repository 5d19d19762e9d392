"""What a run did to its model, in figures: the table at its end, and ``summary.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from diffalign.evaluation.evaluator import Evaluation, ImageEvaluator

SUMMARY_FILE = "summary.json"


def before_and_after(
    before: Evaluation, after: Evaluation, evaluator: ImageEvaluator, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """Compare two evaluations of the same captions and seeds.

    Args:
        before, after: scores of the two models.
        evaluator: which made them.
        settings: of sampling, recorded beside the figures.

    Returns:
        ``rewards`` (name -> before, after), ``by_kind`` (the same for each category by the reward that measures
        exactly, where there is one), ``win_rate`` of after over before by the main reward with its 95 % interval.
    """
    exact = next((name for name, reward in evaluator.rewards.items() if reward.info.needs_metadata), None)
    by_kind: dict[str, dict[str, float]] = {}
    if exact is not None:
        first, last = before.by_kind(exact), after.by_kind(exact)
        by_kind = {kind: {"before": first[kind], "after": last[kind]} for kind in first}
    first, last = before.means(), after.means()
    return {
        "captions": len(evaluator.prompts),
        "settings": dict(settings),
        "rewards": {name: {"before": first[name], "after": last[name]} for name in first},
        "by_kind_reward": exact,
        "by_kind": by_kind,
        "win_rate": {"reward": evaluator.primary, **asdict(evaluator.compare(before, after))},
    }


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json`` into a run folder."""
    (folder / SUMMARY_FILE).write_text(json.dumps(dict(summary), indent=1) + "\n", encoding="utf-8")


def print_table(summary: Mapping[str, Any], console: Console | None) -> None:
    """Print the before/after table."""
    if console is None:
        return
    origin = summary["settings"].get("captions", "held_out").replace("_", "-")
    table = Table(title=f"{summary['captions']} {origin} captions, same seeds")
    for column in ("measure", "before", "after", "change"):
        table.add_column(column, justify="left" if column == "measure" else "right")
    named = dict(summary["rewards"])
    named |= {f"{summary['by_kind_reward']}: {kind}": values for kind, values in summary["by_kind"].items()}
    for name, values in named.items():
        before, after = values["before"], values["after"]
        table.add_row(name, f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    console.print(table)
    rate = summary["win_rate"]
    figures = f"{rate['value']:.3f} (95 % interval {rate['low']:.3f} to {rate['high']:.3f})"
    console.print(
        f"win rate over the start by {rate['reward']}: " + (f"all {rate['tied']} tied" if rate["tied"] else figures),
        highlight=False,
        soft_wrap=True,
    )
