"""What an evaluation depended on: one record beside the images, repeated in every result that is made from them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.records import read_json, write_json

FILE = "manifest.json"
ENVIRONMENT = "environment"
"""The part that may differ between two halves of one evaluation: versions, hardware."""


def generation_of(folder: Path) -> dict[str, Any] | None:
    """Return how the images in a folder were drawn; None where that is not recorded."""
    path = folder / FILE
    if not path.is_file():
        return None
    content = read_json(path)
    return content if isinstance(content, dict) else None


def begin_or_continue(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest of a new folder, or check that a folder that exists was begun with the same.

    Raises:
        UserError: naming the settings that differ, or if the folder holds other files.
    """
    known = generation_of(folder)
    if known is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder} already holds other files (no {FILE}): choose another folder")
        write_json(folder / FILE, manifest)
        return
    if changes := differences(known, manifest):
        raise UserError(
            f"{folder} was begun with other settings ({'; '.join(changes)}): choose another folder or the same settings"
        )


def differences(known: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[str]:
    """List the settings that two manifests do not share, as ``name: this, not that``."""
    found: list[str] = []
    for key in sorted({*known, *wanted} - {ENVIRONMENT}):
        left, right = known.get(key), wanted.get(key)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            found += differences(left, right, f"{prefix}{key}.")
        elif left != right:
            found.append(f"{prefix}{key}: {left}, not {right}")
    return found
