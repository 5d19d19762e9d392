"""Plots of a comparison, one figure a function; drawn by matplotlib without a screen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from diffalign.evaluation.pyplot import load_pyplot
from diffalign.evaluation.report.entries import Entry
from diffalign.evaluation.report.side_by_side import SideBySide

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FIRST_CURVES = ("loss", "reward", "reward_mean", "implicit_accuracy", "winner_margin", "loser_margin", "grad_norm")
"""Metrics shown before others."""
MOST_CURVES = 9
_NO_CURVE = {"step", "examples_per_second", "seconds", "images", "learning_rate", "skipped_steps"}


def colours(names: Sequence[str]) -> dict[str, str]:
    """Return a colour for each model: the first is grey, for it is what the others are measured against."""
    palette = ("#8c8c8c", "#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#e7298a", "#17a2b8", "#bcbd22", "#8c564b")
    return {name: palette[index % len(palette)] for index, name in enumerate(names)}


def distributions(comparison: SideBySide, palette: dict[str, str]) -> Figure:
    """Draw the distribution of every reward: a histogram a model over common bins."""
    figure, axes = _panels(len(comparison.rewards))
    for axis, reward in zip(axes, comparison.rewards, strict=True):
        scores = {entry.name: comparison.scores(entry, reward).numpy() for entry in comparison.entries}
        low, high = min(s.min() for s in scores.values()), max(s.max() for s in scores.values())
        span = (low, high) if high > low else (low - 0.5, high + 0.5)
        for name, values in scores.items():
            axis.hist(values, bins=24, range=span, histtype="step", linewidth=1.6, color=palette[name], label=name)
            axis.axvline(values.mean(), color=palette[name], linestyle=":", linewidth=1)
        axis.set_title(reward, fontsize=10)
        axis.set_ylabel("images", fontsize=8)
    _legend(figure, axes[0])
    return figure


def category_bars(comparison: SideBySide, reward: str, palette: dict[str, str]) -> Figure:
    """Draw a reward's mean in each category, a bar a model."""
    categories = comparison.categories
    figure, (axis,) = _panels(1, width=max(5.0, 1.5 * len(categories)))
    width = 0.8 / len(comparison.names)
    for index, entry in enumerate(comparison.entries):
        places = [place + (index - (len(comparison.names) - 1) / 2) * width for place in range(len(categories))]
        values = list(comparison.by_category(entry, reward).values())
        axis.bar(places, values, width * 0.92, color=palette[entry.name], label=entry.name)
    labels = [f"{category}\n({len(rows)})" for category, rows in categories.items()]
    axis.set_xticks(range(len(categories)), labels, fontsize=8)
    axis.set_title(f"{reward} by category (number of images)", fontsize=10)
    _legend(figure, axis)
    return figure


def training_curves(entries: Sequence[Entry], palette: dict[str, str]) -> Figure | None:
    """Draw the metrics of every run over optimizer steps; None without a run."""
    trained = [entry for entry in entries if entry.curve]
    known = {name for entry in trained for row in entry.curve for name in row} - _NO_CURVE
    shown = [name for name in FIRST_CURVES if name in known] + sorted(known - set(FIRST_CURVES))
    if not shown:
        return None
    shown = shown[:MOST_CURVES]
    figure, axes = _panels(len(shown))
    for axis, metric in zip(axes, shown, strict=True):
        for entry in trained:
            points = [(row["step"], row[metric]) for row in entry.curve if metric in row]
            if points:
                marker = "o" if len(points) == 1 else None
                axis.plot(*zip(*points, strict=True), color=palette[entry.name], marker=marker, label=entry.name)
        axis.set_title(metric, fontsize=10)
        axis.set_xlabel("step", fontsize=8)
    _legend(figure, max(axes, key=lambda axis: len(axis.get_lines())))
    return figure


def _legend(figure: Figure, axis: Axes) -> None:
    """Name the models once, above the panels."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels), fontsize=8, frameon=False)


def _panels(count: int, width: float | None = None) -> tuple[Figure, list[Axes]]:
    """Return a figure with so many panels and their axes, in reading order.

    Raises:
        MissingExtra: without matplotlib.
    """
    pyplot = load_pyplot("the plots of a report")
    columns = min(count, 3)
    rows = -(-count // columns)
    size = (width or 4.2 * columns, 2.9 * rows)
    figure, grid = pyplot.subplots(rows, columns, figsize=size, squeeze=False, layout="constrained")
    axes = list(grid.flat)
    for axis in axes:
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]
