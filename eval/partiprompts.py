"""PartiPrompts by category and challenge: ``python eval/partiprompts.py --images FOLDER --rewards REWARDS``."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from diffalign.cli.main import run_command


def partiprompts(
    images: Path,
    rewards: str,
    baseline: Path | None = None,
    by: tuple[str, ...] = ("category", "challenge"),
    output: Path | None = None,
    device: str = "auto",
    batch_size: int = 16,
) -> int:
    """Score images drawn for PartiPrompts.tsv; with a baseline also the win rate in every group.

    Args:
        images: folder of eval/generate.py, whose captions carry their groups.
        rewards: for example pickscore,hpsv2.1.
        baseline: the same captions and seeds, drawn by another model.
        by: columns of the prompt file that make groups.
        output: JSON file for the figures.
        device: where networks run; auto is an accelerator where there is one.
        batch_size: pictures scored at once.
    """
    from diffalign.device import choose_device
    from diffalign.evaluation.comparison import pair, read_set
    from diffalign.evaluation.groups import group_scores
    from diffalign.records import write_json
    from diffalign.rewards.compose import load_parts, parse_rewards
    from diffalign.rewards.scoring import describe_rewards, score_items

    candidate = read_set(images)
    other = None if baseline is None else read_set(baseline)
    keys = list(candidate.entries) if other is None else pair(candidate, other)[0]
    items = [candidate.entries[key] for key in keys]
    parts = load_parts(parse_rewards(rewards), choose_device(device))
    scores = score_items(items, parts, batch_size)
    others = {} if other is None else score_items([other.entries[key] for key in keys], parts, batch_size)
    records = {}
    for label, values in scores.items():
        groups = group_scores(keys, items, by, values, others.get(label))
        records[label] = {column: [group.as_dict() for group in rows] for column, rows in groups.items()}
        sys.stdout.write(f"{label}: mean {values.mean().item():.4f} of {len(items)} images\n")
        for column, rows in groups.items():
            sys.stdout.write("".join(f"  {column} {group}\n" for group in rows))
    if output is not None:
        generation = {"images": candidate.manifest, "baseline": None if other is None else other.manifest}
        write_json(output, {"results": records, "rewards": describe_rewards(parts), "generation": generation})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(partiprompts, as_positional=False)))
