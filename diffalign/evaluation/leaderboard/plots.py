"""Plots of the board: what changed, and reward during training."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from types import ModuleType
from typing import Any

from diffalign.evaluation.leaderboard.comparison import Row
from diffalign.evaluation.pyplot import load_pyplot

_DATA, _SAMPLES = "#2b5c8a", "#c0622d"


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
        for position, estimate, (row, _) in zip(positions, values, measured, strict=True):
            error = [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]
            color = _SAMPLES if row.entry.samples else _DATA
            axis.errorbar(estimate.value, position, xerr=error, fmt="o", color=color, capsize=2)
        axis.axvline(center, color="#999999", linewidth=1)
        axis.set_title(title, fontsize=10)
    for color, label in ((_DATA, "preference data, baselines"), (_SAMPLES, "methods that sample")):
        left.plot([], [], "o", color=color, label=label)
    figure.legend(fontsize=8, loc="outside lower center", ncols=2)
    left.set_yticks(positions, [row.name for row, _ in measured])
    left.set_ylim(-0.7, len(measured) - 0.3)
    _save(pyplot, figure, path)


def plot_curves(rows: Sequence[Row], path: Path) -> bool:
    """Draw the reward of training images against wall time and against the number of images, one line a row.

    Rows with the same reward share a pair of axes. Points are those of all seeds; for lines see :func:`mean_curve`.

    Returns:
        whether any row has a curve; nothing is written otherwise.

    Raises:
        MissingExtra: without matplotlib.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        if row.curves:
            groups.setdefault(row.reward, []).append(row)
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
    points = [point for curve in row.curves for point in curve]
    axis.plot([p[column] for p in points], [p[3] for p in points], ".", color=color, alpha=0.25, markersize=3)
    x, y = mean_curve(row.curves, column)
    axis.plot(x, y, color=color, linewidth=1.5, label=row.name)


def mean_curve(curves: Sequence[Sequence[Sequence[float]]], column: int) -> tuple[list[float], list[float]]:
    """Return a column and the reward, both averaged over the curves at each step, the reward then over five steps.

    Args:
        curves: of each training seed: (step, seconds, images, reward).
        column: 1 for seconds, 2 for images.
    """
    by_step: dict[float, list[Sequence[float]]] = {}
    for point in (point for curve in curves for point in curve):
        by_step.setdefault(point[0], []).append(point)
    steps = [by_step[step] for step in sorted(by_step)]
    rewards = [fmean(point[3] for point in points) for points in steps]
    smooth = [fmean(rewards[max(0, index - 2) : index + 3]) for index in range(len(rewards))]
    return [fmean(point[column] for point in points) for points in steps], smooth


def _save(pyplot: ModuleType, figure: Any, path: Path) -> None:
    draft = path.with_name(path.stem + ".tmp.png")
    figure.savefig(draft, dpi=110)
    pyplot.close(figure)
    draft.rename(path)
