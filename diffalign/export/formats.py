"""From a run to what other programs load: a LoRA file in their format, an adapter folder, or a merged pipeline."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from diffalign.errors import UserError
from diffalign.export.kohya import KohyaNames, kohya_header, kohya_state
from diffalign.policies.adapters import START_ADAPTER
from diffalign.policies.loading import FAMILIES, load_policy, pipeline_index, resolve
from diffalign.policies.saving import (
    STOCK_METADATA,
    LoraWeights,
    lora_path,
    read_lora,
    read_lora_metadata,
    write_lora,
    write_safetensors,
)
from diffalign.text.saving import write_peft_adapter

Format = Literal["kohya", "diffusers", "peft", "merged"]


def export(run: Path, form: Format, output: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a run's adapter for another program; all or nothing.

    Args:
        run: run folder, or a LoRA file.
        form: "kohya" and "diffusers" are a safetensors file, "peft" a folder for ``PeftModel.from_pretrained``,
            "merged" a pipeline's folder whose denoiser has taken the adapter in.
        output: file or folder to write.
        dtype: type of the weights.

    Returns:
        what was written.

    Raises:
        UserError: for a run without an adapter, a format that its model does not have, an output that is in the way.
    """
    file = lora_path(run)
    if file is None:
        if (run / "model_index.json").is_file():
            raise UserError(
                f"{run} holds all weights of a model, not an adapter: it is a pipeline of diffusers already"
            )
        raise UserError(f"there is no image adapter in {run}: expected a run folder of --train_mode lora, or its file")
    folder = form in ("peft", "merged")
    if folder and (output.is_file() or (output.is_dir() and any(output.iterdir()))):
        raise UserError(f"{output} exists: --format {form} writes a folder of its own, name another")
    if not folder and (output.is_dir() or output.suffix != ".safetensors"):
        raise UserError(f"--format {form} writes one file: give --output NAME.safetensors, not {output}")
    metadata = _described(file)
    if form == "merged":
        _merge(file, output, dtype, metadata)
    else:
        WRITERS[form](file, _adapter(file, dtype), output, metadata)
    return output


def _adapter(file: Path, dtype: torch.dtype) -> LoraWeights:
    weights = read_lora(file, _prefix(file))
    return LoraWeights({key: value.to(dtype) for key, value in weights.state.items()}, weights.settings, {})


def _kohya(file: Path, weights: LoraWeights, output: Path, metadata: dict[str, str]) -> None:
    if _prefix(file) != "unet":
        raise UserError(
            "kohya's format has no agreed names for Stable Diffusion 3: export with --format diffusers, peft or merged"
        )
    from diffusers import UNet2DConditionModel

    source = resolve(file)
    xl = "XL" in pipeline_index(source)["_class_name"]
    revision = {"revision": source.revision} if source.revision else {}
    names = KohyaNames(UNet2DConditionModel.load_config(source.model, subfolder="unet", **revision), xl)
    write_safetensors(output, kohya_state(weights, names), {**metadata, **kohya_header(weights, names)})


def _diffusers(file: Path, weights: LoraWeights, output: Path, metadata: dict[str, str]) -> None:
    write_lora(output, weights.state, weights.settings, _prefix(file), metadata)


def _peft(file: Path, weights: LoraWeights, output: Path, metadata: dict[str, str]) -> None:
    write_peft_adapter(output, weights.state, weights.settings, metadata)


WRITERS: dict[str, Callable[[Path, LoraWeights, Path, dict[str, str]], None]] = {
    "kohya": _kohya,
    "diffusers": _diffusers,
    "peft": _peft,
}


def _merge(file: Path, output: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    policy = load_policy(file)
    policy.adapters.merge(START_ADAPTER)
    for part in policy.parts if dtype is not torch.float32 else []:
        part.to(dtype)
    policy.save(output, metadata)


def _prefix(file: Path) -> str:
    """Name of the denoiser that an adapter belongs to, which stands before its layers."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        first = next(iter(opened.keys()), "").split(".")[0]
    known = {family.denoiser for family in FAMILIES.values()}
    return first if first in known else "unet"  # what does not fit is refused where it is read


def _described(file: Path) -> dict[str, str]:
    """Return what the file says of itself: method, base model, rank, alpha, steps."""
    return {name: value for name, value in read_lora_metadata(file).items() if name != STOCK_METADATA}
