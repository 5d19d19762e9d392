"""T2I-CompBench: ``python eval/t2i_compbench.py --category spatial --images FOLDER --detector DETECTOR``.

Its category "non_spatial" is ``eval/clip_score.py`` with CLIP ViT-B/32.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.errors import UserError
from diffalign.evaluation import compbench
from diffalign.records import read_jsonl, write_json, write_jsonl


def t2i_compbench(
    category: Literal["attribute", "spatial", "complex"],
    images: Path | None = None,
    detector: str | None = None,
    answers: Path | None = None,
    spatial_prompts: Path | None = None,
    action_prompts: Path | None = None,
    output: Path | None = None,
    least_confidence: float = 0.0,
    device: str = "auto",
) -> int:
    """Score a category.

    Args:
        category: attribute (color, shape, texture; from answers), spatial (from images), complex (from answers).
        images: pictures called "CAPTION_000000.png", as eval/generate.py writes them with --layout compbench.
        detector: boxes@FILE (officially of UniDet) or transformers@NAME.
        answers: attribute: JSONL rows with probabilities, one a noun phrase; complex: with prompt, attribute, spatial
            and action.
        spatial_prompts: complex_val_spatial.txt.
        action_prompts: complex_val_action.txt.
        output: folder for scores.jsonl and summary.json.
        least_confidence: detections below it are not looked at.
        device: where networks run; auto is an accelerator where there is one.
    """
    if category == "spatial":
        if images is None or detector is None:
            raise UserError("the category spatial needs --images and --detector")
        rows, label = _spatial(images, detector, least_confidence, device), f"detector {detector}"
    else:
        if answers is None:
            raise UserError(f"the category {category} needs --answers")
        label = f"answers {answers.name}"
        rows = _attribute(answers) if category == "attribute" else _complex(answers, spatial_prompts, action_prompts)
    mean = sum(row["score"] for row in rows) / len(rows)
    sys.stdout.write(f"t2i-compbench {category} ({label}): {mean:.4f} over {len(rows)} rows\n")
    if output is not None:
        write_jsonl(output / "scores.jsonl", rows)
        write_json(output / "summary.json", {"category": category, "from": label, "score": mean, "rows": len(rows)})
    return 0


def _spatial(folder: Path, detector: str, least_confidence: float, device: str) -> list[dict[str, Any]]:
    from diffalign.device import choose_device
    from diffalign.evaluation.geneval.detectors import load_detector

    return compbench.spatial_rows(folder, load_detector(detector, choose_device(device)), least_confidence)


def _attribute(answers: Path) -> list[dict[str, Any]]:
    return [
        {**row, "score": compbench.attribute_score([float(p) for p in row["probabilities"]])}
        for row in read_jsonl(answers, ("probabilities",))
    ]


def _complex(answers: Path, spatial: Path | None, action: Path | None) -> list[dict[str, Any]]:
    if spatial is None or action is None:
        raise UserError("the category complex needs --spatial_prompts and --action_prompts")
    from diffalign.evaluation.prompt_sets import load_prompts

    lists = [{prompt.text for prompt in load_prompts(str(path)).prompts} for path in (spatial, action)]
    return [
        {**row, "score": compbench.complex_score(row, row["prompt"] in lists[0], row["prompt"] in lists[1])}
        for row in read_jsonl(answers, ("prompt", "attribute", "spatial", "action"))
    ]


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(t2i_compbench, as_positional=False)))
