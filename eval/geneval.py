"""GenEval of a folder of images in its layout: ``python eval/geneval.py --images FOLDER --detector DETECTOR``.

``--write_prompts FILE`` writes captions instead: the 553 official ones, or new ones of their kind with ``--seed``.
"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.errors import UserError
from diffalign.evaluation.geneval.verdict import Rules


def geneval(
    images: Path | None = None,
    detector: str = "world",
    output: Path | None = None,
    colors: str | None = None,
    captions: int | None = None,
    allow_incomplete: bool = False,
    device: str = "auto",
    rules: Rules = Rules(),  # noqa: B008 - frozen
    write_prompts: Path | None = None,
    seed: int = 43,
    count: int = 100,
    max_count: int = 4,
) -> int:
    """Judge images, write results.jsonl in the official format, summary.json and manifest.json, print the summary.

    Args:
        images: folder in GenEval's layout, as eval/generate.py writes it with --layout geneval.
        detector: world (the bundled world's verifier), boxes@FILE, or transformers@NAME.
        output: folder for the results; "geneval" in the folder of images by default.
        colors: CLIP model that names colours where the detector does not; "official" for OpenAI's ViT-L/14.
        captions: number of captions there must be.
        allow_incomplete: accept captions with fewer images than others.
        device: where networks run; auto is an accelerator where there is one.
        rules: constants of the verdict; the official ones by default.
        write_prompts: write captions to this file (.txt: captions alone) and judge nothing.
        seed: of the captions; 43 gives the official ones.
        count: captions drawn of each task.
        max_count: largest number that captions ask for.
    """
    from diffalign.device import choose_device
    from diffalign.evaluation.geneval import evaluate, folder, prompts
    from diffalign.evaluation.manifest import generation_of
    from diffalign.records import write_text

    if write_prompts is not None:
        rows = prompts.generate_rows(seed, count, max_count)
        write = prompts.as_prompts if write_prompts.suffix == ".txt" else prompts.as_jsonl
        write_text(write_prompts, write(rows))
        sys.stdout.write(f"{len(rows)} captions in {write_prompts}\n")
        return 0
    if images is None:
        raise UserError("give a folder of images (--images), or a file for captions (--write_prompts)")
    drawn = generation_of(images)
    if captions is None and drawn is not None:
        captions = drawn["prompts"]["used"]
    samples = folder.read_folder(images, captions, allow_incomplete)
    eyes = evaluate.Eyes.load(detector, colors, choose_device(device))
    verdicts = list(evaluate.evaluate(images, samples, eyes, rules))
    where = output or images / evaluate.RESULTS_FOLDER
    summary = evaluate.write_results(where, images, verdicts, eyes, rules)
    sys.stdout.write(f"{eyes.label}, {evaluate.rules_name(rules)}\n{summary.as_text()}")
    sys.stdout.write(f"verdicts in {where / evaluate.RESULTS}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(geneval, as_positional=False)))
