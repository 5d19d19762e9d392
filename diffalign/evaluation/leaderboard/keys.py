"""Hashes of everything that a cell's result depends on, and of nothing else."""

from __future__ import annotations

import hashlib
import json
from functools import cache
from pathlib import Path

from diffalign.bundled import bundled_path
from diffalign.evaluation.leaderboard.entries import STARTS, BoardSettings, Cell, Entry
from diffalign.evaluation.leaderboard.imports import imported_modules, module_path, source_hash
from diffalign.world.evaluation import PROXY

_MEASURING = ("diffalign.policies.loading", "diffalign.inference.generate", "diffalign.world.evaluation")
_TRAINING = ("diffalign.training.api", "diffalign.training.image_domain")
_PREFERENCES = "preferences"


def cell_key(cell: Cell, settings: BoardSettings) -> str:
    """Hash of everything that the cell's result depends on."""
    entry = cell.entry
    parts = {
        "row": cell.row,
        "seed": cell.seed,
        "settings": settings.of(entry),
        "draws": entry.draws,
        "config": entry.config(cell.seed).flat() if entry.method else {},
        "code": code_hash(entry),
        "assets": assets_hash(entry),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def code_hash(entry: Entry) -> str:
    """Hash of the modules that a row's run imports."""
    return source_hash(code_modules(entry))


def code_modules(entry: Entry) -> set[str]:
    """Return the modules that a row's run imports: those of its own method and of its own model, not of others.

    A method from outside this package counts by its configuration alone.
    """
    record = entry.record
    roots = [*_MEASURING, STARTS[entry.model].policy]
    if record is not None:
        roots += [*_TRAINING, record.strategy.__module__]
    others = {start.policy for start in STARTS.values()} - {STARTS[entry.model].policy}
    return imported_modules((name for name in roots if module_path(name) is not None), others)


def assets_hash(entry: Entry) -> str:
    """Hash of the bundled files that a row's run reads: its model, the proxy, and the data where it is trained."""
    folders = [entry.model, PROXY]
    files = [path for name in folders for path in _files(bundled_path(name), deep=True)]
    if entry.method is not None:
        files += _files(bundled_path(_PREFERENCES), deep=False)
    return _hash_files(tuple(files))


def _files(folder: Path, deep: bool) -> list[Path]:
    found = folder.rglob("*") if deep else folder.glob("*")
    return [path for path in sorted(found) if path.is_file() and path.suffix != ".md"]


@cache
def _hash_files(paths: tuple[Path, ...]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
