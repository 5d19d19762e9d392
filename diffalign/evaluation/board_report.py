"""The leaderboard as a page: a markdown table and a plot beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from diffalign.evaluation.leaderboard import BoardSettings, Row
from diffalign.evaluation.pyplot import load_pyplot

_BEGIN, _END = "<!-- board:begin -->", "<!-- board:end -->"
_INTRODUCTION = """# Leaderboard

Every method on the bundled world, from the same start, beside plain fine-tuning on the same winners (`sft`) and
choosing the best of four samples (`best_of_4`). Made by `python eval/leaderboard.py`; text outside the markers is kept.

"""


def write_report(rows: Sequence[Row], settings: BoardSettings, path: Path) -> None:
    """Write the table between the markers of a markdown file, which is made if it is not there, and the plot."""
    table = f"{_BEGIN}\n\n{markdown(rows, settings)}\n![win rates]({path.stem}.png)\n\n{_END}"
    text = path.read_text(encoding="utf-8") if path.is_file() else f"{_INTRODUCTION}{_BEGIN}{_END}\n"
    before, _, rest = text.partition(_BEGIN)
    after = rest.partition(_END)[2]
    plot(rows, path.with_suffix(".png"))
    draft = path.with_suffix(".tmp")
    draft.write_text(before + table + after, encoding="utf-8")
    draft.rename(path)


def markdown(rows: Sequence[Row], settings: BoardSettings) -> str:
    """Return the table: best win rate first."""
    kinds = list(rows[0].by_kind) if rows else []
    head = [
        "method",
        "seeds",
        "win rate over the start",
        "proxy",
        "graded",
        "verifier",
        "its change",
        *kinds,
        "train s",
        "",
    ]
    lines = [
        f"{settings.captions} test captions (seed {settings.test_prompt_seed}), {settings.model}, "
        f"{settings.num_steps} steps, guidance {settings.guidance_scale}; 95 % intervals over captions and seeds.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    for row in sorted(rows, key=lambda r: -r.win_rate.value):
        cells = [
            row.method + (" *" if row.older else ""),
            str(row.seeds),
            str(row.win_rate),
            f"{row.proxy:.3f}",
            f"{row.graded:.3f}",
        ]
        cells += [f"{row.verifier:.3f}", str(row.verifier_change)]
        cells += [f"{row.by_kind[kind]:.2f}" for kind in kinds] + [f"{row.train_seconds:.0f}", row.verdict]
        lines.append("| " + " | ".join(cells) + " |")
    if any(row.older for row in rows):
        lines += ["", "\\* measured with code that has changed since."]
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Draw win rates with their intervals, and verifier scores beside them.

    Raises:
        MissingExtra: without matplotlib.
    """
    pyplot = load_pyplot("the leaderboard's plot")
    ordered = sorted(rows, key=lambda r: r.win_rate.value)
    positions = list(range(len(ordered)))
    figure, (left, right) = pyplot.subplots(
        1, 2, sharey=True, figsize=(9, 1.2 + 0.32 * len(ordered)), layout="constrained"
    )
    for axis, value, center, title in (
        (left, [row.win_rate for row in ordered], 0.5, "win rate over the start (proxy)"),
        (right, [row.verifier_change for row in ordered], 0.0, "change of the verifier's score"),
    ):
        errors = [[max(0.0, e.value - e.low) for e in value], [max(0.0, e.high - e.value) for e in value]]
        axis.errorbar([e.value for e in value], positions, xerr=errors, fmt="o", color="#2b5c8a", capsize=2)
        axis.axvline(center, color="#999999", linewidth=1)
        axis.set_title(title, fontsize=10)
    left.set_yticks(positions, [row.method for row in ordered])
    draft = path.with_name(path.stem + ".tmp.png")
    figure.savefig(draft, dpi=110)
    pyplot.close(figure)
    draft.rename(path)
