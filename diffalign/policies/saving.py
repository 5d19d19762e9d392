"""LoRA files that stock diffusers loads, and whole pipelines; written under a temporary name, then renamed."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.policies.adapters import AdapterBank, LoraSettings

LORA_FILE = "pytorch_lora_weights.safetensors"
"""Name that ``pipe.load_lora_weights(folder)`` looks for."""
PIPELINE_METADATA = "diffalign.json"
"""Where a whole pipeline's metadata go, beside its ``model_index.json``."""
STOCK_METADATA = "lora_adapter_metadata"
"""Under this key of a LoRA file stock diffusers keeps the shape of its adapters."""


@dataclass(frozen=True)
class LoraWeights:
    """What a LoRA file holds.

    Args:
        state: ``PATH.lora_A.weight`` -> tensor, paths inside the denoiser.
        settings: shape of the adapter.
        metadata: what was written beside it: method, base_model, ...
    """

    state: Mapping[str, Tensor]
    settings: LoraSettings
    metadata: Mapping[str, str]


def save_lora(folder: Path, bank: AdapterBank, name: str, prefix: str, metadata: Mapping[str, str]) -> Path:
    """Write one adapter as ``pytorch_lora_weights.safetensors``.

    Args:
        folder: where to; made if missing.
        bank, name: the adapter.
        prefix: the denoiser's name in the pipeline, "unet" or "transformer".
        metadata: further text to record; rank and alpha are added.

    Raises:
        UserError: if the file cannot be written; then nothing is left behind.
    """
    path = folder / LORA_FILE
    write_lora(path, bank.state_dict(name), bank.settings(name), prefix, metadata)
    return path


def write_lora(
    path: Path, state: Mapping[str, Tensor], settings: LoraSettings, prefix: str, metadata: Mapping[str, str]
) -> None:
    """Write an adapter's weights in the format of stock diffusers.

    Args:
        path: the file.
        state: ``PATH.lora_A.weight`` -> tensor, paths inside the denoiser.
        settings: shape of the adapter.
        prefix, metadata: as of :func:`save_lora`.

    Raises:
        UserError: if the file cannot be written; then nothing is left behind.
    """
    stock = {"r": settings.rank, "lora_alpha": settings.scale_numerator, "target_modules": list(settings.targets)}
    header = {
        "format": "pt",
        **metadata,
        "rank": str(settings.rank),
        "alpha": str(settings.scale_numerator),
        STOCK_METADATA: json.dumps({f"{prefix}.{key}": value for key, value in stock.items()}),
    }
    write_safetensors(path, {f"{prefix}.{key}": value.cpu().contiguous() for key, value in state.items()}, header)


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Write a safetensors file under a temporary name, then rename it; missing folders are made.

    Raises:
        UserError: if it cannot be written; then nothing is left behind.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode  # what the user's umask grants; safetensors would grant the owner alone
        save_file(dict(tensors), temporary, dict(header))
        temporary.chmod(mode)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        with suppress(OSError):
            temporary.unlink()
        raise UserError(f"cannot write {path}: {error}") from error


def lora_path(path: str | Path) -> Path | None:
    """Return the LoRA file that a path names, itself or as its folder; None if there is none."""
    path = Path(path).expanduser()
    if path.is_file() and path.suffix == ".safetensors":
        return path
    return path / LORA_FILE if (path / LORA_FILE).is_file() else None


def read_lora_metadata(path: Path) -> dict[str, str]:
    """Return the text stored in a LoRA file.

    Raises:
        UserError: if the file is no whole safetensors file.
    """
    try:
        with safe_open(path, "pt") as file:
            return dict(file.metadata() or {})
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is no whole safetensors file: {error}") from error


def read_lora(path: str | Path, prefix: str) -> LoraWeights:
    """Read an adapter of a denoiser.

    Args:
        path: a LoRA file or its folder.
        prefix: the denoiser's name in the pipeline, "unet" or "transformer".

    Raises:
        UserError: if there is no such file, it is damaged, in another format, or also changes other parts.
    """
    file = lora_path(path)
    if file is None:
        raise UserError(f"no adapter in {path}: expected {LORA_FILE} there, or the path of a .safetensors file")
    metadata = read_lora_metadata(file)
    with safe_open(file, "pt") as opened:
        names = list(opened.keys())
        foreign = [n for n in names if not (n.startswith(f"{prefix}.") and (".lora_A." in n or ".lora_B." in n))]
        if foreign or not names:
            raise UserError(
                f"{file} is no adapter of the {prefix} alone in diffusers' format ({len(foreign)} of {len(names)} "
                f"names do not fit, such as {foreign[:1]}): load it in the pipeline it was made for and save it with "
                "save_lora_weights"
            )
        state = {name.removeprefix(f"{prefix}."): opened.get_tensor(name) for name in names}
    return LoraWeights(state, _settings(file, state, _stock_metadata(metadata, prefix)), metadata)


def save_pipeline(folder: Path, pipeline: Any, metadata: Mapping[str, str]) -> None:
    """Write a whole pipeline that ``from_pretrained(folder)`` loads; ``model_index.json`` appears last.

    Raises:
        UserError: if it cannot be written.
    """
    with drafted(folder, "model_index.json") as draft:
        pipeline.save_pretrained(draft, safe_serialization=True)
        (draft / PIPELINE_METADATA).write_text(json.dumps(dict(metadata), indent=2) + "\n", encoding="utf-8")


@contextmanager
def drafted(folder: Path, last: str) -> Iterator[Path]:
    """Give a draft folder whose entries move into ``folder`` at the end; nothing of it stays where writing fails.

    Args:
        folder: where to; made if missing. Entries of the same names are replaced, others stay.
        last: name of the entry that makes the rest complete; it moves last.

    Raises:
        UserError: if it cannot be written.
    """
    draft = folder / ".draft.tmp"
    try:
        draft.mkdir(parents=True, exist_ok=True)
        yield draft
        for part in sorted(draft.iterdir(), key=lambda path: (path.name == last, path.name)):
            if (folder / part.name).is_dir():
                shutil.rmtree(folder / part.name)
            os.replace(part, folder / part.name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {last} and what belongs to it to {folder}: {error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _stock_metadata(metadata: Mapping[str, str], prefix: str) -> dict[str, Any]:
    stored = json.loads(metadata.get(STOCK_METADATA, "{}"))
    return {key.removeprefix(f"{prefix}."): value for key, value in stored.items()}


def _settings(file: Path, state: Mapping[str, Tensor], stock: Mapping[str, Any]) -> LoraSettings:
    ranks = {value.shape[0] for key, value in state.items() if ".lora_A." in key}
    if len(ranks) != 1 or stock.get("alpha_pattern"):
        raise UserError(f"{file} mixes adapters of ranks {sorted(ranks)} or of several scales: only one is supported")
    targets = stock.get("target_modules") or sorted({key.split(".lora_")[0] for key in state})
    rank = ranks.pop()
    return LoraSettings(rank, scale_numerator(stock, rank), targets=tuple(targets))


def scale_numerator(config: Mapping[str, Any], rank: int) -> float:
    """Return the alpha that gives, divided by the rank, the scale of an adapter that peft describes.

    Rank-stabilised LoRA (arXiv 2312.03732) divides by the root of the rank.

    Args:
        config: peft's description, maybe empty: then the scale is 1.
        rank: of the adapter.
    """
    alpha: float = config.get("lora_alpha", rank)
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha
