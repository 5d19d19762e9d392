"""The leaderboard as a page: markdown tables, and plots beside it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from diffalign.evaluation.leaderboard.comparison import Row
from diffalign.evaluation.leaderboard.entries import BEST_OF_4, STARTS, TINY_SD3, BoardSettings
from diffalign.evaluation.leaderboard.plots import plot_curves, plot_rows
from diffalign.evaluation.winrate import Estimate
from diffalign.records import write_text
from diffalign.world.evaluation import PROXY

_BEGIN, _END = "<!-- board:begin -->", "<!-- board:end -->"
_BESIDE = (BEST_OF_4, BEST_OF_4 + STARTS[TINY_SD3].suffix, "sft")
"""Rows without a reward that are shown beside those that have one."""
_INTRODUCTION = """# Leaderboard

Every method on the bundled world, from the same start, beside plain fine-tuning on the same winners (`sft`) and
choosing the best of four samples (`best_of_4`). Made by `python eval/leaderboard.py`; text outside the markers is kept.

"""


def write_report(rows: Sequence[Row], settings: BoardSettings, path: Path, absent: Sequence[str] = ()) -> None:
    """Write tables between the markers of a markdown file, which is made if it is not there, and the plots.

    Args:
        rows: in any order.
        settings: of the board.
        path: the markdown file; plots go beside it.
        absent: names of rows whose model is not bundled.
    """
    body = [markdown(rows, settings, absent), f"![changes]({path.stem}.png)\n"]
    plot_rows(rows, path.with_suffix(".png"))
    if plot_curves(rows, path.with_name(f"{path.stem}_curves.png")):
        body.append(f"![reward during training]({path.stem}_curves.png)\n")
    text = path.read_text(encoding="utf-8") if path.is_file() else f"{_INTRODUCTION}{_BEGIN}{_END}\n"
    before, _, rest = text.partition(_BEGIN)
    write_text(path, "\n".join([f"{before}{_BEGIN}\n", *body, f"{_END}{rest.partition(_END)[2]}"]))


def markdown(rows: Sequence[Row], settings: BoardSettings, absent: Sequence[str] = ()) -> str:
    """Return the tables: methods on preference data, best win rate first, then methods that sample."""
    models = dict.fromkeys(row.entry.model for row in rows)
    guidance = ", ".join(f"{model} with guidance {STARTS[model].guidance_scale}" for model in models)
    lines = [
        f"{settings.captions} test captions (seed {settings.test_prompt_seed}), {settings.num_steps} steps, "
        f"{guidance}; 95 % intervals over captions and training seeds.",
        "",
        *_preference_table([row for row in rows if not row.entry.samples]),
        *_reward_table([row for row in rows if row.entry.samples or row.name in _BESIDE]),
    ]
    if any(row.older for row in rows):
        lines += ["\\* measured with code that has changed since.", ""]
    if absent:
        lines += [f"Not here, as their model is not bundled: {', '.join(absent)}.", ""]
    return "\n".join(lines)


def _preference_table(rows: Sequence[Row]) -> list[str]:
    kinds = list(rows[0].by_kind) if rows else []
    head = ["method", "seeds", "win rate over the start", "proxy", "graded", "verifier", "its change", *kinds]
    body = [
        [
            _name(row),
            str(row.seeds),
            f"{row.win_rate.value:.3f}" if row.is_start and row.win_rate else _shown(row.win_rate),
            *(f"{row.means[name]:.3f}" if row.means else "" for name in (PROXY, "graded", "verifier")),
            "" if row.is_start else _shown(row.changes.get("verifier")),
            *(f"{row.by_kind[kind]:.2f}" if row.by_kind else "" for kind in kinds),
            f"{row.train_seconds:.0f}",
            row.verdict,
        ]
        for row in sorted(rows, key=lambda row: (row.entry.model, -row.win_rate.value if row.win_rate else 0.0))
    ]
    return _table("Methods on preference data, and baselines", [*head, "train s", ""], body)


def _reward_table(rows: Sequence[Row]) -> list[str]:
    scores = (PROXY, "graded", "verifier")
    body = [
        [
            _name(row),
            row.entry.model,
            str(row.seeds),
            _aim(row),
            _shown(row.own[2] if row.own else None, "+"),
            *(_shown(row.changes.get(name), "+") for name in scores),
            f"{row.train_seconds:.0f}",
            f"{row.train_images:.0f}" if row.train_images else "",
            row.verdict if row.entry.samples else "",
        ]
        for row in sorted(rows, key=lambda row: (row.entry.model, row.reward, row.name))
    ]
    head = ["method", "model", "seeds", "its own reward", "change", "proxy", "graded", "verifier"]
    return _table("Methods that sample: change of each score", [*head, "train s", "images", ""], body)


def _aim(row: Row) -> str:
    """The row's own reward with its values before and after."""
    return row.reward + (f": {row.own[0]:.3f} → {row.own[1]:.3f}" if row.own else "")


def _table(title: str, head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(cells)} |" for cells in body]
    rule = "|" + " --- |" * len(head)
    return [f"**{title}**", "", f"| {' | '.join(head)} |", rule, *lines, ""] if lines else []


def _name(row: Row) -> str:
    return row.name + (" *" if row.older else "")


def _shown(estimate: Estimate | None, sign: str = "") -> str:
    return "" if estimate is None else estimate.shown(sign)
