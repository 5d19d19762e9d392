"""``diffalign score``: score image files by any set of rewards."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser


def score_command(argv: Sequence[str], rewards: str | None = None, prog: str = "diffalign score") -> int:
    """Score images, print the mean of every reward, write one row an image.

    Args:
        argv: the command line.
        rewards: the rewards of a script that is made for some; "NAME" or "NAME@SOURCE" by option otherwise.
        prog: name of the command in its help.

    Raises:
        UserError: for unknown rewards, or images and captions that cannot be read.
    """
    parser = ArgumentParser(prog=prog, description="Score images by rewards.")
    parser.add_argument("images", type=Path, help="folder of images, or a JSONL file with image, prompt and metadata")
    parser.add_argument("--prompts", type=Path | None, default=None, help="captions of a folder, one a line")
    parser.add_argument(
        "--rewards",
        type=str,
        default=rewards,
        required=rewards is None,
        help="for example pickscore,hpsv2@FILE,incompressibility; or a YAML file",
    )
    parser.add_argument("--output", type=Path | None, default=None, help="JSONL file for the score of every image")
    parser.add_argument("--device", type=str, default="auto", help="where networks run; auto: an accelerator, if any")
    parser.add_argument(
        "--dtype",
        type=Literal["float32", "bfloat16", "float16"] | None,
        default=None,
        help="how networks run; float32, large vision-language models on CUDA bfloat16, where it is not given",
    )
    parser.add_argument("--batch_size", type=int, default=16, help="pictures scored at once")
    options = parser.parse_args(list(argv))
    import torch

    from diffalign.device import choose_device
    from diffalign.evaluation.manifest import generation_of
    from diffalign.rewards.compose import load_parts, parse_rewards
    from diffalign.rewards.scoring import read_items, score_items, write_scores

    items = read_items(options.images, options.prompts)
    dtype = getattr(torch, options.dtype) if options.dtype else None
    parts = load_parts(parse_rewards(options.rewards), choose_device(options.device), dtype)
    scores = score_items(items, parts, options.batch_size)
    for label, values in scores.items():
        low, high = values.min().item(), values.max().item()
        unit = parts[label].info.unit
        sys.stdout.write(f"{label}: mean {values.mean().item():.4f}, {low:.4f} to {high:.4f} ({unit})\n")
    sys.stdout.write(f"{len(items)} images scored\n")
    if options.output is not None:
        drawn = generation_of(options.images if options.images.is_dir() else options.images.parent)
        write_scores(options.output, items, parts, scores, drawn)
    return 0
