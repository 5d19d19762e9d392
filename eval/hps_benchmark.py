"""HPSv2's benchmark in its four styles: ``python eval/hps_benchmark.py --images FOLDER --prompts FOLDER``."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from diffalign.cli.main import run_command


def hps_benchmark(
    images: Path,
    prompts: Path,
    reward: str = "hpsv2.1",
    output: Path | None = None,
    allow_missing: bool = False,
    chunk: int = 80,
    device: str = "auto",
    batch_size: int = 16,
) -> int:
    """Score images by style, in the official arithmetic.

    Args:
        images: STYLE/00000.jpg, ..., as eval/generate.py writes them with --layout hps.
        prompts: folder with anime.json, concept-art.json, paintings.json and photo.json.
        reward: the scorer with its version; numbers of hpsv2 and hpsv2.1 are not comparable.
        output: JSON file for the figures.
        allow_missing: leave out images that are not there.
        chunk: captions whose mean counts as one in the deviation.
        device: where networks run; auto is an accelerator where there is one.
        batch_size: pictures scored at once.
    """
    from diffalign.device import choose_device
    from diffalign.evaluation.hps import read_images, summarise
    from diffalign.evaluation.manifest import generation_of
    from diffalign.records import write_json
    from diffalign.rewards.compose import load_parts, parse_rewards
    from diffalign.rewards.scoring import describe_rewards, score_items

    found = read_images(images, prompts, allow_missing)
    parts = load_parts(parse_rewards(reward), choose_device(device))
    scores = score_items(found.items, parts, batch_size)
    records = {}
    for label, values in scores.items():
        summary = summarise(values, found.styles, parts[label].info, chunk)
        sys.stdout.write(f"{label}: average {summary.average:.4f}\n")
        for style, (mean, deviation) in summary.styles.items():
            sys.stdout.write(f"  {style:<12} {mean:.4f} +- {deviation:.4f}\n")
        styles = {style: {"mean": mean, "std": deviation} for style, (mean, deviation) in summary.styles.items()}
        records[label] = {"average": summary.average, "styles": styles}
    sys.stdout.write(f"{len(found.items)} images, {len(found.missing)} missing\n")
    if output is not None:
        write_json(
            output,
            {
                "benchmark": "hpsv2",
                "results": records,
                "images": len(found.items),
                "missing": list(found.missing),
                "prompts_sha256": found.prompts_sha256,
                "rewards": describe_rewards(parts),
                "generation": generation_of(images),
            },
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(hps_benchmark, as_positional=False)))
