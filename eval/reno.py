"""Optimise noise: ``python eval/reno.py --model MODEL --prompts PROMPTS --rewards REWARDS --output FOLDER``.

Beside it, best-of-n with as many generations. A stopped run goes on where it was.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.cli.quiet import quiet_environment, quiet_libraries


def reno(
    model: str,
    prompts: str,
    output: Path,
    rewards: str,
    judges: str = "",
    steps: int = 50,
    baseline: bool = True,
    batch_size: int = 4,
    seed: int = 0,
    limit: int | None = None,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    learning_rate: float | None = None,
    norm_weight: float = 0.01,
    max_grad_norm: float = 0.1,
    patience: int = 0,
    dtype: Literal["float32", "bfloat16", "float16"] | None = None,
    checkpointing: bool = False,
    vae_slicing: bool = False,
) -> int:
    """Search, compare, and write images, noise and scores.

    Args:
        model: sd-turbo, sdxl-turbo, pixart-dmd, hyper-sdxl, flux-schnell; a bundled name, folder, or hub name.
        prompts: geneval, world, a file (.txt, .jsonl, .json, .csv, .tsv), a folder, or USER/DATASET/FILE on the hub.
        output: folder for the results; one that exists is continued if its settings are the same.
        rewards: what is optimised, such as pickscore:0.05,hpsv2.1:5.
        judges: rewards that only look at the results, such as verifier.
        steps: iterations of a search, and images of best-of-n.
        baseline: run best-of-n too.
        batch_size: captions side by side.
        seed: caption i starts from seed + i.
        limit: use only the first captions of the set.
        num_inference_steps: denoising steps; the model's own by default, else 1.
        guidance_scale: guidance; the model's own by default, else none.
        learning_rate: of the noise; the model's own by default, else 5.
        norm_weight: weight of the penalty on the norm of the noise.
        max_grad_norm: bound on the norm of each caption's gradient.
        patience: end a search after so many iterations without a better image; 0 never does.
        dtype: how the model runs; its own by default, else float32.
        checkpointing: less memory, more time.
        vae_slicing: decode images one at a time.
    """
    quiet_environment()
    quiet_libraries()
    import torch

    from diffalign.evaluation.noise_benchmark import NoiseBenchmark
    from diffalign.evaluation.prompt_sets import load_prompts

    chosen = load_prompts(prompts).first(limit)
    sampling = {
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "dtype": None if dtype is None else getattr(torch, dtype),
        "checkpointing": checkpointing,
        "vae_slicing": vae_slicing,
    }
    search = {"norm_weight": norm_weight, "max_grad_norm": max_grad_norm, "patience": patience}
    if learning_rate is not None:
        search["learning_rate"] = learning_rate
    benchmark = NoiseBenchmark(model, rewards, judges, steps, baseline, batch_size, seed, sampling, search)

    def progress(done: int) -> None:
        sys.stdout.write(f"{done} of {len(chosen.prompts)} captions\n")
        sys.stdout.flush()

    summary = benchmark.run(chosen, output, progress=progress)
    for name, figures in summary["rewards"].items():
        shown = ", ".join(f"{kind} {v:.4f}" if isinstance(v, float) else f"{kind} {v}" for kind, v in figures.items())
        sys.stdout.write(f"{name}: {shown}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(reno, as_positional=False)))
