"""From what a user says to a whole configuration: defaults, then a preset, then the user's own options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from diffalign.strategies.base import Spec
from diffalign.strategies.registry import get_method
from diffalign.training.config import GROUPS, ModelOptions, TrainConfig, option_defaults
from diffalign.training.launch import launched_precision
from diffalign.training.option_types import check_types
from diffalign.training.presets import NONE, find_preset

_SAYS_OTHERWISE = {"gradient_accumulation_steps": "global_batch_pairs", "num_train_epochs": "max_train_steps"}
"""Option -> another that says the same: a preset's value of the latter goes where a user gives the former."""
DECIDING = ("pretrained_model_name_or_path", "preset", "train_mode", *_SAYS_OTHERWISE)
"""Options that decide which defaults the others have."""


def default_model(spec: Spec) -> str:
    """The bundled model that a run starts from when none is named."""
    usual = "tiny-writer" if spec.modality == "text" else ModelOptions().pretrained_model_name_or_path
    return spec.bundled_model or usual


def resolve_defaults(method: str, model: str | None = None, said: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return every option of a run with its default: the preset's, the launcher's mixed precision.

    Args:
        method: the method's name.
        model: name or path; None for the method's bundled one.
        said: those of :data:`DECIDING` that the user gives.

    Raises:
        UserError: for a preset that is asked for and does not exist.
    """
    record = get_method(method)
    model, said = model or default_model(record.strategy.spec), said or {}
    defaults = option_defaults(record.strategy.Config)
    mode = said.get("train_mode") or defaults["train_mode"]
    preset = find_preset(model, method, mode, said.get("preset"))
    options = dict(preset.options) if preset else {}
    strange = sorted(set(options) - set(defaults))
    if preset and strange:
        raise ValueError(f"preset {preset.name}/{method} names options that do not exist: {strange}")
    for given, left in _SAYS_OTHERWISE.items():
        if said.get(given) not in (None, 0, "0"):
            options.pop(left, None)
    launched = launched_precision(os.environ)
    at_launch = {"mixed_precision": launched} if launched else {}
    named = {"pretrained_model_name_or_path": model, "preset": preset.name if preset else NONE}
    return {**defaults, **named, **options, **at_launch}


def resolve_config(method: str, options: Mapping[str, Any]) -> TrainConfig:
    """Build the configuration of a run.

    Args:
        method: the method's name.
        options: outside name -> value, only those that differ from the defaults; paths may be ``Path`` objects.

    Raises:
        UserError: for unknown methods, options and presets, values of a wrong type, and contradictions.
    """
    options = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in options.items()}
    own = get_method(method).strategy.Config
    for part in (own, *GROUPS.values()):
        check_types(part, options)
    defaults = resolve_defaults(method, options.get("pretrained_model_name_or_path"), options)
    return TrainConfig.from_flat(method, own, {**defaults, **options})
