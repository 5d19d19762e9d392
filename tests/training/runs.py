"""Runs of tiny pipelines of the real classes: their options, and what they leave behind."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from rich.console import Console

import diffalign
from diffalign.training.trackers import METRICS_FILE

ROOT = Path(__file__).resolve().parents[2]
LORA = "pytorch_lora_weights.safetensors"


def options(model: str, folder: Path, **changes: Any) -> dict[str, Any]:
    """Options of a short run, with changes."""
    return {
        "pretrained_model_name_or_path": model,
        "output_dir": str(folder),
        "rank": 2,
        "train_batch_size": 2,
        "global_batch_pairs": 4,
        "max_train_steps": 4,
        "learning_rate": 1e-2,
        "num_validation_images": 1,
        "num_inference_steps": 1,
        **changes,
    }


def train(data: str, model: str, folder: Path, method: str = "diffusion_dpo", **changes: Any) -> Any:
    """Run, and return the result with what was said."""
    console = Console(file=io.StringIO(), width=200)
    result = diffalign.train(data, method=method, console=console, **options(model, folder, **changes))
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def curve(folder: Path) -> list[dict[str, float]]:
    """The lines of optimizer steps; those of validations have no loss."""
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [line for line in lines if "loss" in line]
