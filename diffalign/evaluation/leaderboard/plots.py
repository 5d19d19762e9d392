"""Plots of the board: what changed, and reward during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from diffalign.evaluation.leaderboard.comparison import Row
from diffalign.evaluation.pyplot import load_pyplot


def plot_rows(rows: Sequence[Row], path: Path) -> None:
    """Draw win rates with their intervals, and changes of the verifier's scores beside them.

    Raises:
        MissingExtra: without matplotlib.
    """
    pyplot = load_pyplot("the leaderboard's plot")
    measured = [(row, row.win_rate) for row in rows if row.win_rate is not None]
    measured.sort(key=lambda pair: pair[1].value)
    positions = list(range(len(measured)))
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(9, 1.2 + 0.32 * len(measured)), layout="constrained"
    )
    for axis, values, center, title in (
        (left, [rate for _, rate in measured], 0.5, "win rate over the start (proxy)"),
        (right, [row.changes["verifier"] for row, _ in measured], 0.0, "change of the verifier's score"),
    ):
        errors = [[max(0.0, e.value - e.low) for e in values], [max(0.0, e.high - e.value) for e in values]]
        axis.errorbar([e.value for e in values], positions, xerr=errors, fmt="o", color="#2b5c8a", capsize=2)
        axis.axvline(center, color="#999999", linewidth=1)
        axis.set_title(title, fontsize=10)
    left.set_yticks(positions, [row.name for row, _ in measured])
    _save(pyplot, figure, path)


def plot_curves(rows: Sequence[Row], path: Path) -> bool:
    """Draw the reward of training images against wall time and against the number of images, one line a row.

    Rows with the same reward share a pair of axes. Points are those of all seeds; lines are their running means.

    Returns:
        whether any row has a curve; nothing is written otherwise.

    Raises:
        MissingExtra: without matplotlib.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.curves:
            groups.setdefault(" + ".join(row.entry.rewards), []).append(row)
    if not groups:
        return False
    pyplot = load_pyplot("the leaderboard's plot")
    figure, axes = pyplot.subplots(
        len(groups), 2, squeeze=False, sharey="row", figsize=(11, 3.4 * len(groups)), layout="constrained"
    )
    for pair, (reward, members) in zip(axes, groups.items(), strict=True):
        for axis, column, label in ((pair[0], 1, "seconds of training"), (pair[1], 2, "images sampled")):
            for index, row in enumerate(members):
                _draw_curve(axis, row, column, f"C{index}")
            axis.set_xlabel(label)
        pair[0].set_ylabel(reward)
        pair[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    _save(pyplot, figure, path)
    return True


def _draw_curve(axis: Any, row: Row, column: int, color: str) -> None:
    points = sorted((curve_point[column], curve_point[3]) for curve in row.curves for curve_point in curve)
    x, y = [point[0] for point in points], [point[1] for point in points]
    reach = 2 * len(row.curves)
    smooth = [_mean(y[max(0, i - reach) : i + reach + 1]) for i in range(len(y))]
    axis.plot(x, y, ".", color=color, alpha=0.25, markersize=3)
    axis.plot(x, smooth, color=color, linewidth=1.5, label=row.name)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _save(pyplot: ModuleType, figure: Any, path: Path) -> None:
    draft = path.with_name(path.stem + ".tmp.png")
    figure.savefig(draft, dpi=110)
    pyplot.close(figure)
    draft.rename(path)
