"""Win rate of one model over another: ``python eval/winrate.py --a FOLDER --b FOLDER --rewards REWARDS``."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.evaluation.comparison import Interval


def winrate(
    a: Path,
    b: Path,
    rewards: str,
    output: Path | None = None,
    prompts: Path | None = None,
    interval: Interval = "auto",
    tie_margin: float = 0.0,
    allow_differences: bool = False,
    device: str = "auto",
    batch_size: int = 16,
) -> int:
    """Compare images of the same captions and seeds by rewards; ties count one half, no image counts twice.

    Args:
        a: images of the candidate: a folder of eval/generate.py, a JSONL table, or a folder with captions.
        b: images of the baseline.
        rewards: for example pickscore,hpsv2.1; the reward that was trained on does not prove a gain.
        output: folder for one JSONL file a reward and winrate.json.
        prompts: captions of two plain folders, one a line.
        interval: bootstrap over captions; wilson or exact (binomial) for one image a caption; auto is exact where
            captions have one image each, else bootstrap.
        tie_margin: largest difference of scores that is a tie.
        allow_differences: compare although seeds or sampling settings differ.
        device: where networks run; auto is an accelerator where there is one.
        batch_size: pictures scored at once.
    """
    from diffalign.device import choose_device
    from diffalign.evaluation.comparison import Comparison, pair, read_set
    from diffalign.records import write_json, write_jsonl
    from diffalign.rewards.compose import load_parts, parse_rewards
    from diffalign.rewards.scoring import describe_rewards, score_items

    candidate, baseline = read_set(a, prompts), read_set(b, prompts)
    keys, changes = pair(candidate, baseline, allow_differences)
    parts = load_parts(parse_rewards(rewards), choose_device(device))
    scores = [score_items([side.entries[key] for key in keys], parts, batch_size) for side in (candidate, baseline)]
    summaries = []
    for label in parts:
        comparison = Comparison(keys, scores[0][label], scores[1][label], tie_margin)
        summary = comparison.summary(label, interval)
        summaries.append(summary)
        sys.stdout.write(
            f"{label}: win rate {summary['shown']} "
            f"({summary['wins']} won, {summary['ties']} tied, {summary['losses']} lost; "
            f"mean {summary['mean_a']:.4f} against {summary['mean_b']:.4f})\n"
        )
        if output is not None:
            write_jsonl(output / f"{label.replace('/', '_')}.jsonl", comparison.rows(candidate.seeds))
    duplicates = candidate.duplicates + baseline.duplicates
    sys.stdout.write(f"{len(keys)} pairs of images of {summaries[0]['n']} captions; {duplicates} repeats not counted\n")
    if output is not None:
        write_json(
            output / "winrate.json",
            {
                "a": str(a),
                "b": str(b),
                "summaries": summaries,
                "rewards": describe_rewards(parts),
                "repeats_not_counted": duplicates,
                "differences": changes,
                "generation": {"a": candidate.manifest, "b": baseline.manifest},
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(winrate, as_positional=False)))
