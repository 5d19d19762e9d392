"""What a text run shows besides its metrics: held-out rewards before and after, with samples."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from diffalign.text.evaluation import TextComparison, TextEvaluation, TextEvaluator, compare_texts
from diffalign.text.policy import TextPolicy
from diffalign.training.runfolder import RunFolder
from diffalign.training.trackers import Tracker

SHOWN_SAMPLES = 12
SUMMARY = "summary.json"
SAMPLES = "samples.md"
_BEFORE = "evaluation_before.json"


class TextObserver:
    """Measures the held-out reward at the start, at every validation and at the end; an ``Observer`` of the loop.

    Args:
        policy: the model under training.
        evaluator: prompts and reward.
        console: where the table goes; None prints nothing.
    """

    def __init__(self, policy: TextPolicy, evaluator: TextEvaluator, console: Console | None = None) -> None:
        self._policy, self._evaluator, self._console = policy, evaluator, console

    def before(self, folder: RunFolder) -> None:
        """Measure the start; kept in the run folder, so that a resumed run still compares with it."""
        start = self._evaluator.evaluate(self._policy)
        record = {"completions": list(start.completions), "rewards": start.rewards.tolist()}
        (folder.path / _BEFORE).write_text(json.dumps(record) + "\n", encoding="utf-8")

    def during(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> None:
        """Measure and log the mean reward."""
        self._log(step, self._evaluator.evaluate(self._policy), trackers)

    def after(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> dict[str, Any]:
        """Measure the end, print the table, write ``summary.json`` and ``samples.md``, return the summary."""
        end = self._evaluator.evaluate(self._policy)
        self._log(step, end, trackers)
        start = self._start(folder)
        if start is None:
            return {"reward_after": end.mean}
        comparison = compare_texts(start, end)
        summary = {**comparison.summary(), "by_kind_before": start.by_kind(), "by_kind_after": end.by_kind()}
        (folder.path / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
        (folder.path / SAMPLES).write_text(samples_page(self._evaluator.prompts, start, end), encoding="utf-8")
        if self._console is not None:
            self._console.print(reward_table(comparison, start, end))
        return summary

    def _log(self, step: int, evaluation: TextEvaluation, trackers: Sequence[Tracker]) -> None:
        for tracker in trackers:
            tracker.log(step, {"evaluation/reward": evaluation.mean})

    def _start(self, folder: RunFolder) -> TextEvaluation | None:
        path = folder.path / _BEFORE
        if not path.is_file():
            return None
        record = json.loads(path.read_text(encoding="utf-8"))
        return TextEvaluation(record["completions"], torch.tensor(record["rewards"]), self._evaluator.kinds)


def reward_table(comparison: TextComparison, before: TextEvaluation, after: TextEvaluation) -> Table:
    """Return the table that a run prints at its end."""
    table = Table(title=f"held-out reward, {len(after.rewards)} prompts, same seeds")
    for heading in ("", "before", "after", "95 % interval"):
        table.add_column(heading, justify="left" if not heading else "right")
    gain, wins = comparison.gain, comparison.win_rate
    table.add_row("mean reward", f"{comparison.before:.3f}", f"{comparison.after:.3f}", "")
    table.add_row("gain", "", f"{gain.value:+.3f}", f"{gain.low:+.3f} to {gain.high:+.3f}")
    shown = (str(wins), "") if wins.tied else (f"{wins.value:.3f}", f"{wins.low:.3f} to {wins.high:.3f}")
    table.add_row("win rate", "", *shown)
    ended = after.by_kind()
    for kind, value in before.by_kind().items():
        table.add_row(f"  {kind}", f"{value:.3f}", f"{ended[kind]:.3f}", "")
    return table


def samples_page(prompts: Sequence[str], before: TextEvaluation, after: TextEvaluation) -> str:
    """Return a page of samples before and after, in Markdown."""
    lines = ["| prompt | before | reward | after | reward |", "|---|---|---|---|---|"]
    for index, prompt in enumerate(prompts[:SHOWN_SAMPLES]):
        cells = (prompt, before.completions[index], f"{before.rewards[index]:g}", after.completions[index])
        lines.append("| " + " | ".join(" ".join(cell.split()) for cell in cells) + f" | {after.rewards[index]:g} |")
    return "\n".join(lines) + "\n"
