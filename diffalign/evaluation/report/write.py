"""Write a comparison: a page that needs no other file, its plots as PNG, its tables as markdown."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffalign import __version__
from diffalign.errors import MissingExtra, UserError
from diffalign.evaluation.report import plots
from diffalign.evaluation.report.entries import GENEVAL, Entry
from diffalign.evaluation.report.side_by_side import SideBySide, images_of, put_side_by_side
from diffalign.evaluation.winrate import Estimate
from diffalign.records import write_bytes, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE, TABLES = "report.html", "report.md"
_CONFIG_SHOWN = (
    "method", "pretrained_model_name_or_path", "dataset_name", "max_train_steps", "learning_rate", "rank",
    "global_batch_pairs", "seed",
)  # fmt: skip
_LARGEST_INLINE = 96 * 1024


@dataclass(frozen=True)
class ReportOptions:
    """What a report shows.

    Args:
        title: heading of the page.
        captions: rows of the image grid.
        side: images of more pixels a side are made smaller for the page.
        tie_margin: largest difference of scores that counts as a tie.
        allow_differences: compare although seeds or sampling settings differ; the page says so.
    """

    title: str = "Comparison"
    captions: int = 24
    side: int = 320
    tie_margin: float = 0.0
    allow_differences: bool = False


def write_report(entries: Sequence[Entry], folder: Path, options: ReportOptions | None = None) -> Path:
    """Write ``report.html``, ``report.md`` and a PNG for each plot; returns the page.

    Args:
        entries: models; the first is what others are measured against.
        folder: where to; files appear whole or not at all.
        options: what is shown.

    Raises:
        UserError: if there is nothing to compare, or an image cannot be read.
        MissingExtra: without matplotlib or jinja2.
    """
    options = options or ReportOptions()
    comparison = put_side_by_side(entries, options.allow_differences)
    figures = draw_figures(entries, comparison)
    if comparison is None and not figures:
        raise UserError("nothing to report: give folders of images, or folders of training runs")
    tables = comparison_tables(comparison, options.tie_margin) if comparison else []
    rendered = {name: _png(figure) for name, figure in figures.items()}
    page = _template().render(
        title=options.title,
        version=__version__,
        comparison=comparison,
        settings=settings_table(entries),
        tables=tables,
        figures={name: _inline(data, "image/png") for name, data in rendered.items()},
        grid=image_grid(comparison, options) if comparison else [],
        colours=plots.colours([entry.name for entry in entries]),
        units={reward: unit for entry in entries for reward, unit in entry.units.items()},
        tie_margin=options.tie_margin,
    )
    for name, data in rendered.items():
        write_bytes(folder / f"{name}.png", data)
    write_text(folder / TABLES, markdown(options.title, settings_table(entries), tables, list(rendered)))
    write_text(folder / PAGE, page)
    return folder / PAGE


def draw_figures(entries: Sequence[Entry], comparison: SideBySide | None) -> dict[str, Figure]:
    """Return name of the file -> figure, for what there is to draw."""
    palette = plots.colours([entry.name for entry in entries])
    found: dict[str, Figure | None] = {}
    if comparison and comparison.rewards:
        found["distributions"] = plots.distributions(comparison, palette)
        if len(comparison.categories) > 1:
            # One figure is enough: GenEval's verdicts where there are some, else the first reward.
            reward = GENEVAL if GENEVAL in comparison.rewards else comparison.rewards[0]
            found["categories"] = plots.category_bars(comparison, reward, palette)
    found["training"] = plots.training_curves(entries, palette)
    return {name: figure for name, figure in found.items() if figure is not None}


@dataclass(frozen=True)
class Table:
    """A table of figures.

    Args:
        title: what it shows.
        head: heads of the columns; the first is that of the row names.
        rows: name of a row, its cells as text, and for each cell a value in [0, 1] that colours it, or None.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[str], Sequence[float | None]]]


def comparison_tables(comparison: SideBySide, tie_margin: float = 0.0) -> list[Table]:
    """Return the mean scores, then a matrix of win rates for each reward."""
    entries, rewards, names = comparison.entries, comparison.rewards, comparison.names
    plain = [None] * len(rewards)
    means = [(entry.name, [str(comparison.mean(entry, reward)) for reward in rewards], plain) for entry in entries]
    tables = [Table("Mean scores", ["model", *rewards], means)] if rewards else []
    if len(entries) < 2:
        return tables
    for reward in rewards:
        rates: dict[tuple[str, str], Estimate] = {}
        for one, other in itertools.combinations(entries, 2):
            rate = comparison.win_rate(one, other, reward, tie_margin)
            rates[one.name, other.name] = rate
            rates[other.name, one.name] = Estimate(1 - rate.value, 1 - rate.high, 1 - rate.low, rate.tied)
        cells = {name: [rates.get((name, rival)) for rival in names] for name in names}
        rows = [
            (name, [str(rate or "") for rate in row], [_shade(rate) for rate in row]) for name, row in cells.items()
        ]
        tables.append(Table(f"Win rates by {reward}", ["row over column", *names], rows))
    return tables


def _shade(rate: Estimate | None) -> float | None:
    """Colour only what the interval allows to say."""
    return rate.value if rate is not None and (rate.low > 0.5 or rate.high < 0.5) else None


def settings_table(entries: Sequence[Entry]) -> Table:
    """Return how each model was trained and its images were drawn; a row where nothing is known is left out."""
    facts: list[dict[str, str]] = []
    for entry in entries:
        fact = {name: str(entry.config[name]) for name in _CONFIG_SHOWN if name in entry.config}
        drawn = (entry.images.manifest if entry.images else None) or {}
        if "preset" in drawn:
            fact["sampling preset"] = str(drawn["preset"])
        fact |= {f"sampling {name}": str(value) for name, value in drawn.get("sampling", {}).items()}
        if prompts := drawn.get("prompts"):
            fact["prompts"] = f"{prompts.get('name', '')}, sha256 {str(prompts.get('sha256', ''))[:12]}"
        facts.append(fact)
    rows = [(name, [fact.get(name, "") for fact in facts]) for name in dict.fromkeys(n for fact in facts for n in fact)]
    head = ["setting", *(entry.name for entry in entries)]
    return Table("Settings", head, [(name, cells, [None] * len(cells)) for name, cells in rows])


def image_grid(comparison: SideBySide, options: ReportOptions) -> list[dict[str, Any]]:
    """Return the rows of the image grid: a caption, and for each model its image with its scores."""
    rows = []
    for key in comparison.sample(options.captions):
        scores = [{reward: entry.scores[key][reward] for reward in comparison.rewards} for entry in comparison.entries]
        best = {
            reward: max(row[reward] for row in scores)
            for reward in comparison.rewards
            if len({row[reward] for row in scores}) > 1
        }
        cells = [
            {
                "image": inline_image(images_of(entry).entries[key].image, options.side),
                "scores": [(reward, f"{value:.3g}", value == best.get(reward)) for reward, value in row.items()],
            }
            for entry, row in zip(comparison.entries, scores, strict=True)
        ]
        first = images_of(comparison.entries[0])
        rows.append({"prompt": first.entries[key].prompt, "seed": first.seeds.get(key), "cells": cells})
    return rows


def inline_image(path: Path, side: int) -> str:
    """Return an image as a data address: its own bytes where they are few, else a smaller JPEG.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        data = path.read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            kind = Image.MIME.get(image.format or "", "")
            if (
                max(image.size) <= side
                and len(data) <= _LARGEST_INLINE
                and kind in {"image/png", "image/jpeg", "image/webp"}
            ):
                image.load()
                return _inline(data, kind)
            small = image.convert("RGB")
    except (OSError, SyntaxError, ValueError) as problem:
        raise UserError(f"cannot read the image {path}: {problem}") from None
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=88)
    return _inline(buffer.getvalue(), "image/jpeg")


def markdown(title: str, settings: Table, tables: Sequence[Table], figures: Sequence[str]) -> str:
    """Return tables and plots as a markdown document."""
    parts = [f"# {title}\n"]
    for table in [*tables, *([settings] if settings.rows else [])]:
        lines = [f"## {table.title}\n", _line(table.head), "|" + " --- |" * len(table.head)]
        lines += [_line([name, *cells]) for name, cells, _ in table.rows]
        parts.append("\n".join(lines) + "\n")
    parts += [f"![{name}]({name}.png)\n" for name in figures]
    return "\n".join(parts)


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _template() -> Any:
    try:
        import jinja2
    except ImportError as error:
        raise MissingExtra("jinja2", "eval", "the page of a report") from error
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files("diffalign.evaluation.report") / "page.html.j2").read_text(encoding="utf-8"))


def _png(figure: Figure) -> bytes:
    from matplotlib import pyplot

    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=120)
    pyplot.close(figure)
    return buffer.getvalue()


def _inline(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
