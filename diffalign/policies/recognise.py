"""What a file or folder is that is no diffusers pipeline, and what its owner can do with it."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffalign.errors import UserError

CHECKPOINT_SUFFIXES = frozenset({".safetensors", ".ckpt", ".pt", ".pth", ".bin"})
_WHOLE_MODEL = ("model.diffusion_model.", "first_stage_model.")
"""How names of weights begin in the single files that other tools keep a whole model in."""
_CLASSES = {
    "model.diffusion_model.joint_blocks.": "StableDiffusion3Pipeline",
    "conditioner.embedders.1.": "StableDiffusionXLPipeline",
}
"""Beginning of names that only this pipeline has; StableDiffusionPipeline has none of them."""


def is_lora(path: Path) -> bool:
    """Whether a safetensors file may hold a LoRA; also of a damaged one, of which reading it says more."""
    try:
        return any("lora" in name for name in _names(path))
    except (OSError, SafetensorError):
        return True


def not_a_pipeline(name: str, path: Path) -> UserError:
    """Say what lies at a path that holds neither a pipeline nor an adapter, and what it can be used for.

    Args:
        name: as it was given.
        path: an existing file or folder.
    """
    if path.is_file():
        return UserError(f"{name} {_file(path)}")
    config = _config(path)
    part, network = config.get("_class_name"), str((config.get("architectures") or [""])[0])
    if part:
        told = f"is one part of a pipeline ({part}): name the folder above it, which holds model_index.json"
    elif "CLIP" in network:
        told = f"is a reward ({network}) and draws no images: give it to --rewards, and a pipeline such as tiny-sd here"
    elif network:
        told = f"is a {network} of transformers: language models are trained by diffalign train-text"
    elif any((path / f"{table}.parquet").is_file() for table in ("pairs", "lists")):
        told = "is a data set: give it to --dataset_name, and a pipeline such as tiny-sd here"
    elif files := sorted(file for file in path.iterdir() if _is_checkpoint(file)):
        return UserError(f"{files[0]} {_file(files[0])}")
    else:
        told = (
            "is no model: expected model_index.json (a diffusers pipeline), or an adapter in "
            "pytorch_lora_weights.safetensors"
        )
    return UserError(f"{name} {told}")


def _file(path: Path) -> str:
    if not _is_checkpoint(path):
        return "is no model: expected the folder of a diffusers pipeline, or an adapter as a .safetensors file"
    kind = "StableDiffusionPipeline"
    if path.suffix == ".safetensors":
        names = _names(path)
        kind = next((found for start, found in _CLASSES.items() if any(n.startswith(start) for n in names)), kind)
    return (
        "is a checkpoint in a single file: make a folder of it, once and where the hub can be reached, and name that: "
        f"python -c \"from diffusers import {kind} as P; P.from_single_file({str(path)!r}).save_pretrained('FOLDER')\""
    )


def _is_checkpoint(path: Path) -> bool:
    """Whether a file holds a whole model; pickled ones are believed to, as they are not opened."""
    if path.suffix != ".safetensors":
        return path.is_file() and path.suffix in CHECKPOINT_SUFFIXES
    with suppress(OSError, SafetensorError):
        return any(name.startswith(_WHOLE_MODEL) for name in _names(path))
    return False


def _names(path: Path) -> list[str]:
    with safe_open(path, "pt") as file:
        return list(file.keys())


def _config(folder: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        return config if isinstance(config, dict) else {}
    return {}
