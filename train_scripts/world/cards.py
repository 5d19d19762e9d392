"""Stage "cards": a README.md in every asset folder, and the tables of ``docs/world.md``, from the measured figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffalign.world.grammar import KINDS
from train_scripts.world import measure
from train_scripts.world.workspace import Workspace

TEXTS = Path(__file__).parent / "cards"
PAGE = Path(__file__).parents[2] / "docs" / "world.md"
MARK = '<!-- measured: written by the stage "cards" -->'
REBUILD = "Made by `python -m train_scripts.world.build`; all weights are float16 safetensors. Licence: Apache-2.0."


def write(workspace: Workspace) -> None:
    """Write the card of every asset that exists."""
    figures = measure.read(workspace)
    for text in sorted(TEXTS.glob("*.md")):
        folder = workspace.out / text.stem
        if folder.is_dir():
            parts = [
                text.read_text(encoding="utf-8"),
                table(figures.get(text.stem, {})),
                f"Size: {size(folder)}. {REBUILD}",
            ]
            (folder / "README.md").write_text(
                "\n\n".join(part.strip() for part in parts if part) + "\n", encoding="utf-8"
            )
    if workspace.out.resolve() == PAGE.parents[1] / "assets":
        PAGE.write_text(with_figures(PAGE.read_text(encoding="utf-8"), figures), encoding="utf-8")


def with_figures(page: str, figures: dict[str, Any]) -> str:
    """Replace what stands between a page's two marks by the measured tables."""
    before, _, after = page.split(MARK)
    others = [f"**{name}**\n\n{table(figures[name])}" for name in figures if name not in measure.SAMPLING]
    return MARK.join([before, "\n\n" + "\n\n".join([scores(figures), *others]) + "\n\n", after])


def table(figures: dict[str, Any]) -> str:
    """Return figures as a Markdown table."""
    if not figures:
        return ""
    rows = [f"| {name.replace('_', ' ')} | {readable(value)} |" for name, value in figures.items()]
    return "\n".join(["| measured | |", "| --- | --- |", *rows])


def scores(figures: dict[str, Any]) -> str:
    """Return the verifier scores of all models, by kind, as a Markdown table."""
    models = [name for name in measure.SAMPLING if name in figures]
    columns = ["correct", "graded", *KINDS]
    head = ["| model | steps | guidance | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
    rule = ["| --- " * (len(columns) + 3) + "|"]
    rows = [
        "| " + " | ".join([m, *(readable(figures[m].get(c, "")) for c in ("steps", "guidance_scale", *columns))]) + " |"
        for m in models
    ]
    return "\n".join(head + rule + rows)


def readable(value: Any) -> str:
    """Write a figure with three digits after the point."""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def size(folder: Path) -> str:
    """Return the size of a folder in megabytes."""
    return f"{sum(path.stat().st_size for path in folder.rglob('*') if path.is_file()) / 1e6:.1f} MB"
