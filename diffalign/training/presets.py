"""Hyper-parameters published with the package: for the bundled models, and for models that papers have trained.

A preset is a folder ``diffalign/presets/<name>`` with a YAML file a method, over its ``_common.yaml``. Options that
belong to adapters or to the training of all weights stand under ``lora`` or ``full``: the two want other learning
rates. Every value names its source in a comment. A preset belongs to a model by the model's name, nothing is guessed
from paths; for copies elsewhere there is ``--preset``.

What papers publish is about single methods. Any other method has of their models' presets what belongs to the model:
the options of ``_common.yaml`` outside ``lora`` and ``full``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.bundled import is_bundled
from diffalign.errors import UserError, unknown
from diffalign.records import read_yaml

PRESETS = Path(__file__).resolve().parent.parent / "presets"
NONE = "none"
"""What ``--preset`` says for no preset at all."""
_COMMON = "_common"
_MODES = ("lora", "full")
PUBLISHED: Mapping[str, tuple[str, ...]] = {
    "sd15": (
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "runwayml/stable-diffusion-v1-5",
        "CompVis/stable-diffusion-v1-4",
    ),
    "sd21": (
        "stabilityai/stable-diffusion-2-1",
        "stabilityai/stable-diffusion-2-1-base",
        "stabilityai/stable-diffusion-2",
        "stabilityai/stable-diffusion-2-base",
    ),
    "sd-turbo": ("stabilityai/sd-turbo",),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0",),
    "sdxl-turbo": ("stabilityai/sdxl-turbo",),
    "sd3": (
        "stabilityai/stable-diffusion-3.5-medium",
        "stabilityai/stable-diffusion-3.5-large",
        "stabilityai/stable-diffusion-3-medium-diffusers",
    ),
}
"""Preset of models that papers have trained -> their names on the hub."""


@dataclass(frozen=True)
class Preset:
    """What a preset says for a method and a way of training.

    Args:
        name: its folder.
        options: option -> value.
        whole: it has values for the method, and not for the model alone.
    """

    name: str
    options: Mapping[str, Any]
    whole: bool = True


def preset_names() -> list[str]:
    """Return the names of all presets."""
    return sorted(folder.name for folder in PRESETS.iterdir() if folder.is_dir())


def preset_name(model: str, preset: str | None = None) -> str | None:
    """Return the preset that a model is trained with; None for none.

    Args:
        model: as it is named on the command line.
        preset: what ``--preset`` says; None where it is not given, and the model's name decides.

    Raises:
        UserError: for a preset that does not exist.
    """
    if preset is not None:
        if preset not in (NONE, *preset_names()):
            raise unknown("preset", preset, (NONE, *preset_names()))
        return None if preset == NONE else preset
    if is_bundled(model):
        return model if model in preset_names() else None
    return next((name for name, models in PUBLISHED.items() if model in models), None)


def find_preset(model: str, method: str, train_mode: str = "lora", preset: str | None = None) -> Preset | None:
    """Return the preset of a run; None where there is none.

    Args:
        model, preset: as of :func:`preset_name`.
        method: the method's name.
        train_mode: "lora" or "full".

    Raises:
        UserError: for a preset that is asked for and does not exist.
    """
    name = preset_name(model, preset)
    return None if name is None else read_preset(name, method, train_mode)


def read_preset(name: str, method: str, train_mode: str = "lora") -> Preset:
    """Return what a preset says for a method: its own values over the common ones, or those of the model alone."""
    common, own = (_read(PRESETS / name / f"{part}.yaml") for part in (_COMMON, method))
    whole = name not in PUBLISHED or train_mode in own
    parts = (common, common.get(train_mode, {}), own, own.get(train_mode, {})) if whole else (common,)
    merged = {option: value for part in parts for option, value in part.items() if option not in _MODES}
    return Preset(name, merged | ({"train_mode": train_mode} if name in PUBLISHED else {}), whole)


def _read(path: Path) -> dict[str, Any]:
    return read_options(path) if path.is_file() else {}


def read_options(path: Path) -> dict[str, Any]:
    """Read a mapping of options from a YAML file.

    Raises:
        UserError: if the file is missing or holds anything but a mapping.
    """
    values = read_yaml(path) or {}
    if not isinstance(values, dict):
        raise UserError(f"{path} must hold a mapping of options to values, not a {type(values).__name__}")
    return values
