"""From what a user says to a whole configuration: defaults, then the model's preset, then the user's own options."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import UserError
from diffalign.strategies.base import Spec
from diffalign.strategies.registry import get_method
from diffalign.training.config import GROUPS, ModelOptions, TrainConfig, option_defaults
from diffalign.training.launch import launched_precision
from diffalign.training.option_types import check_types

PRESETS = Path(__file__).resolve().parent.parent / "presets"
COMMON = "_common"


def default_model(spec: Spec) -> str:
    """The bundled model that a run starts from when none is named."""
    usual = "tiny-writer" if spec.modality == "text" else ModelOptions().pretrained_model_name_or_path
    return spec.bundled_model or usual


def preset_options(model: str, method: str) -> dict[str, Any]:
    """Return the options published with the package for a model and a method; empty when there are none.

    Presets are YAML files ``diffalign/presets/<model>/<method>.yaml`` over ``<model>/_common.yaml``. They exist for
    bundled models by name only: nothing is guessed from paths.
    """
    folder = PRESETS / model
    if "/" in model or not folder.is_dir():
        return {}
    options: dict[str, Any] = {}
    for name in (COMMON, method):
        path = folder / f"{name}.yaml"
        if path.is_file():
            options.update(read_yaml(path))
    return options


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a flat mapping of options.

    Raises:
        UserError: if the file is missing or holds anything but a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"no configuration file at {path}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of options to values, not a {type(values).__name__}")
    return values


def resolve_defaults(method: str, model: str | None = None) -> dict[str, Any]:
    """Return every option of a run with its default: the preset's of its model, the launcher's mixed precision."""
    record = get_method(method)
    model = model or default_model(record.strategy.spec)
    defaults = option_defaults(record.strategy.Config)
    preset = preset_options(model, method)
    strange = sorted(set(preset) - set(defaults))
    if strange:
        raise ValueError(f"preset {model}/{method} names options that do not exist: {strange}")
    launched = launched_precision(os.environ)
    at_launch = {"mixed_precision": launched} if launched else {}
    return {**defaults, "pretrained_model_name_or_path": model, **preset, **at_launch}


def resolve_config(method: str, options: Mapping[str, Any]) -> TrainConfig:
    """Build the configuration of a run.

    Args:
        method: the method's name.
        options: outside name -> value, only those that differ from the defaults; paths may be ``Path`` objects.

    Raises:
        UserError: for unknown methods and options, values of a wrong type, and contradictions.
    """
    options = {name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in options.items()}
    own = get_method(method).strategy.Config
    for part in (own, *GROUPS.values()):
        check_types(part, options)
    defaults = resolve_defaults(method, options.get("pretrained_model_name_or_path"))
    return TrainConfig.from_flat(method, own, {**defaults, **options})
