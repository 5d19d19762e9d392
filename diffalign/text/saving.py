"""Adapters in peft's own format, and whole models; written under a temporary name, then renamed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.policies.adapters import AdapterBank, LoraSettings
from diffalign.policies.saving import drafted, scale_numerator

ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
"""Names that ``PeftModel.from_pretrained(model, folder)`` looks for."""
MODEL_METADATA = "diffalign.json"
_PREFIX = "base_model.model."


@dataclass(frozen=True)
class PeftAdapter:
    """What an adapter folder holds.

    Args:
        state: ``PATH.lora_A.weight`` -> tensor, paths inside the model.
        settings: shape of the adapter.
        base_model: the model it was trained on; empty if the folder does not say.
    """

    state: Mapping[str, Tensor]
    settings: LoraSettings
    base_model: str


def save_peft_adapter(folder: Path, bank: AdapterBank, name: str, metadata: Mapping[str, str]) -> None:
    """Write one adapter of a language model; see :func:`write_peft_adapter`."""
    write_peft_adapter(folder, bank.state_dict(name), bank.settings(name), metadata, task_type="CAUSAL_LM")


def write_peft_adapter(
    folder: Path,
    state: Mapping[str, Tensor],
    settings: LoraSettings,
    metadata: Mapping[str, str],
    task_type: str | None = None,
) -> None:
    """Write an adapter so that peft loads it; the config, which makes it complete, comes last.

    Args:
        folder: where to; made if missing.
        state: ``PATH.lora_A.weight`` -> tensor, paths inside the network.
        settings: shape of the adapter.
        metadata: text for the weights' header; ``base_model`` is also what peft reads.
        task_type: what peft calls the network's task, where it knows it.

    Raises:
        UserError: if it cannot be written.
    """
    config = {
        "peft_type": "LORA",
        "task_type": task_type,
        "base_model_name_or_path": metadata.get("base_model", ""),
        "r": settings.rank,
        "lora_alpha": settings.scale_numerator,
        "lora_dropout": settings.dropout,
        "target_modules": list(settings.targets),
        "bias": "none",
        "inference_mode": True,
    }
    state = {f"{_PREFIX}{key}": value.cpu().contiguous() for key, value in state.items()}
    with drafted(folder, ADAPTER_CONFIG) as draft:
        save_file(state, draft / ADAPTER_WEIGHTS, {"format": "pt", **metadata})
        (draft / ADAPTER_CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def read_peft_adapter(folder: Path) -> PeftAdapter:
    """Read a LoRA adapter of a language model.

    Raises:
        UserError: if the folder holds none, it is damaged, or of a kind that is not supported.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        state = load_file(folder / ADAPTER_WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"no whole adapter in {folder} ({ADAPTER_CONFIG}, {ADAPTER_WEIGHTS}): {error}") from error
    foreign = [key for key in state if not (key.startswith(_PREFIX) and (".lora_A." in key or ".lora_B." in key))]
    if foreign or config.get("peft_type") != "LORA" or config.get("rank_pattern") or config.get("alpha_pattern"):
        raise UserError(
            f"the adapter in {folder} is no LoRA of one rank and one scale in peft's format "
            f"(such as {(foreign or [config.get('peft_type')])[0]!r}): only that is supported"
        )
    targets = config.get("target_modules") or []
    if isinstance(targets, str):  # a pattern: take the modules that it matched
        targets = sorted({key.removeprefix(_PREFIX).split(".lora_")[0] for key in state})
    settings = LoraSettings(config["r"], scale_numerator(config, config["r"]), targets=tuple(targets))
    own = {key.removeprefix(_PREFIX): value for key, value in state.items()}
    return PeftAdapter(own, settings, config.get("base_model_name_or_path") or "")


def save_model(folder: Path, module: Any, tokenizer: Any, metadata: Mapping[str, str]) -> None:
    """Write a whole model that ``AutoModelForCausalLM.from_pretrained(folder)`` loads; ``config.json`` appears last.

    Raises:
        UserError: if it cannot be written.
    """
    with drafted(folder, "config.json") as draft:
        module.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        (draft / MODEL_METADATA).write_text(json.dumps(dict(metadata), indent=2) + "\n", encoding="utf-8")
