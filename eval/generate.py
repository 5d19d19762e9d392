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
    import torch

    from diffalign.evaluation import generation, manifest
    from diffalign.evaluation.layouts import plan
    from diffalign.evaluation.presets import choose_preset
    from diffalign.evaluation.prompt_sets import load_prompts
    from diffalign.policies.loading import Source, load_adapter, load_policy, resolve
    from diffalign.policies.saving import lora_path
    from diffalign.training.processes import Processes

    chosen = load_prompts(prompts).first(limit)
    source = resolve(model)
    processes = Processes()
    with processes.main_first():
        policy = load_policy(model, dtype=getattr(torch, dtype), device=processes.device)
    if adapter is not None:
        load_adapter(policy, adapter, "evaluated")
        source = Source(source.model, lora_path(Path(adapter)), source.revision, source.variant)
    settings = choose_preset(preset, source.model, type(policy).__name__).changed(
        steps=steps, guidance=guidance, images_per_prompt=images_per_prompt, resolution=resolution, seed=seed
    )
    shots = plan(chosen.prompts, settings, layout)
    with processes.main_first():
        manifest.begin_or_continue(output, generation.describe(policy, source, chosen, settings, layout, batch_size))
    drawn = generation.draw(policy, shots, settings, output, processes, batch_size)
    total = sum(processes.exchange(drawn))
    if processes.is_main:
        generation.finish(shots, output, layout)
        sys.stdout.write(f"{len(shots)} images in {output} ({total} drawn now), preset {settings.name}\n")
    processes.wait()
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(generate, as_positional=False)))
