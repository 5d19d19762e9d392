"""Draw the images of a benchmark: ``python eval/generate.py --model MODEL --prompts PROMPTS --output FOLDER``.

Several processes: ``accelerate launch eval/generate.py ...``. A stopped run goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.cli.quiet import quiet_environment, quiet_libraries


def generate(
    model: str,
    prompts: str,
    output: Path,
    adapter: str | None = None,
    preset: str | None = None,
    layout: str = "flat",
    steps: int | None = None,
    guidance: float | None = None,
    images_per_prompt: int | None = None,
    resolution: int | None = None,
    seed: int | None = None,
    limit: int | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    batch_size: int = 8,
) -> int:
    """Draw images, with a table (images.jsonl) and a record of all settings (manifest.json) beside them.

    Args:
        model: bundled name, folder, hub name, or the folder of a training run.
        prompts: geneval, world, a file (.txt, .jsonl, .json, .csv, .tsv), a folder, or USER/DATASET/FILE on the hub.
        output: folder for the images; one that exists is continued if its settings are the same.
        adapter: folder or file of a LoRA on the model.
        preset: named sampling settings; those of the model by default. Options given below change them and their name.
        layout: flat, geneval, hps, compbench or unigenbench: names of the files.
        steps: denoising steps.
        guidance: classifier-free guidance.
        images_per_prompt: images of each caption.
        resolution: side in pixels.
        seed: base seed.
        limit: use only the first captions of the set.
        dtype: how the networks run.
        batch_size: images drawn at once.
    """
    quiet_environment()
    quiet_libraries()
    from diffalign.evaluation.generation import Request, draw_request
    from diffalign.training.processes import Processes

    changes = {
        "steps": steps,
        "guidance": guidance,
        "images_per_prompt": images_per_prompt,
        "resolution": resolution,
        "seed": seed,
    }
    processes = Processes()
    drawn = draw_request(
        Request(model, prompts, output, adapter, preset, changes, layout, limit, dtype, batch_size), processes
    )
    if processes.is_main:
        sys.stdout.write(f"{drawn.images} images in {output} ({drawn.now} drawn now), preset {drawn.preset}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(generate, as_positional=False)))
