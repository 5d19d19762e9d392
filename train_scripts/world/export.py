"""Saving finished models: float16 files that load as float32."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch


def save_half(model: Any, folder: Path) -> None:
    """Write a pipeline or model as float16 safetensors.

    transformers would load its parts in the type their configuration names, diffusers loads its own in float32, and a
    pipeline of both types fails: so the configurations name float32. They also forget where the parts were loaded from.
    """
    model.to(torch.float16).save_pretrained(folder)
    for path in folder.rglob("config.json"):
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        if "dtype" in config:
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
