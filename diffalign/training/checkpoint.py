"""Checkpoints: whole or absent, never half.

A checkpoint is a folder ``checkpoints/step-00000050`` with

- ``weights.safetensors``: the trained parameters by name;
- ``state.safetensors`` and ``state.json``: optimizer moments, moving average, gradient scaler, guards, the strategy's
  own state, values remembered of the reference, the loader's position, the step, the options, and what the run is
  (:class:`RunIdentity`);
- ``manifest.json``: size and SHA-256 of each file. It is written last.

The folder is written under another name, flushed to disk, and renamed. Nothing of it is a pickle. All processes hold
the same state, so the main one writes it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.training.processes import Processes
from diffalign.training.state_files import pack, unpack

T = TypeVar("T")

MANIFEST = "manifest.json"
_FORMAT = 1
_PREFIX = "step-"
_FREE_OPTIONS = {"output_dir", "resume_from_checkpoint"}
"""Options that differ between a run and its continuation without any meaning."""


class BrokenCheckpoint(Exception):
    """A checkpoint that is not whole, and why."""


@dataclass(frozen=True)
class RunIdentity:
    """What must be the same for a checkpoint to be continued.

    Args:
        method: the method's name.
        model: the base model as the user named it.
        train_mode: adapters or all weights.
        rank: of the adapters; 0 in full fine-tuning.
        reference: what the reference is (see ``Reference.identity``), empty without one.
        lora_targets: what the adapters are attached to; empty in full fine-tuning.
        global_batch: examples of one optimizer step, which the order of the data goes by.
        pinned_draws: whether values of the reference are remembered.
    """

    method: str
    model: str
    train_mode: str
    rank: int
    reference: str
    lora_targets: str = ""
    global_batch: int = 0
    pinned_draws: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint, read.

    Args:
        step: optimizer steps done.
        weights: trained parameters by name.
        state: everything else, as it was given to :func:`save_checkpoint`.
        folder: where it lies.
    """

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]
    folder: Path

    def check_identity(self, expected: RunIdentity) -> None:
        """Refuse to continue another kind of run.

        Raises:
            UserError: naming what differs.
        """
        _refuse_unlike(self.folder, self.state["identity"], asdict(expected))

    def changed_options(self, config: Mapping[str, Any]) -> list[str]:
        """Return a line for each option that is not what it was when the checkpoint was written."""
        saved = self.state["config"]
        now = json.loads(json.dumps(dict(config)))
        return [
            f"note: {name} is {now[name]!r} now, it was {saved.get(name)!r}"
            for name in now
            if name not in _FREE_OPTIONS and saved.get(name) != now[name]
        ]


def save_checkpoint(root: Path, step: int, weights: Mapping[str, Tensor], state: Mapping[str, Any], keep: int) -> Path:
    """Write a checkpoint, then remove the oldest beyond ``keep`` and those of later steps.

    Checkpoints of later steps are there when a run was continued from an earlier one: they belong to the continuation
    that was given up, and ``latest`` must not find them.

    Args:
        root: folder of all checkpoints of the run.
        step: optimizer steps done.
        weights: trained parameters by name.
        state: nested tensors and plain values.
        keep: how many checkpoints stay, this one included; 0 for all.

    Raises:
        UserError: if it cannot be written (no space, no permission); then nothing of it is left.
    """
    final = root / f"{_PREFIX}{step:08d}"
    temporary = root / f".{final.name}.tmp"
    tree, tensors = pack({"step": step, **state})
    try:
        root.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        _, trained = pack(dict(weights))
        save_file({name[1:]: value for name, value in trained.items()}, temporary / "weights.safetensors")
        save_file(tensors, temporary / "state.safetensors")
        (temporary / "state.json").write_text(json.dumps(tree, indent=1), encoding="utf-8")
        files = {path.name: {"size": path.stat().st_size, "sha256": _hash(path)} for path in temporary.iterdir()}
        (temporary / MANIFEST).write_text(json.dumps({"format": _FORMAT, "files": files}, indent=1), encoding="utf-8")
        for path in temporary.iterdir():
            _flush(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(temporary, final)
        _flush(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(
            f"cannot write a checkpoint to {root}: {error}. Free some space or choose another --output_dir, then "
            "continue with --resume_from_checkpoint latest; earlier checkpoints are untouched"
        ) from error
    present = list_checkpoints(root)
    count = present.index(final) + 1
    oldest = count - keep if keep else 0
    for stale in (*present[: max(0, oldest)], *present[count:]):
        shutil.rmtree(stale, ignore_errors=True)
    return final


def list_checkpoints(root: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first, whole or not."""
    return sorted(path for path in root.glob(f"{_PREFIX}*") if path.is_dir())


def read_checkpoint(folder: Path, hashed: bool = True) -> Checkpoint:
    """Read a checkpoint after checking every file against the manifest.

    Args:
        folder: where it lies.
        hashed: compare contents too, not only sizes; needless where another process has just done so.

    Raises:
        BrokenCheckpoint: if a file is missing, truncated or altered.
    """
    _require_whole(folder, hashed)
    state = unpack(_read_tree(folder), load_file(folder / "state.safetensors"))
    return Checkpoint(state["step"], load_file(folder / "weights.safetensors"), state, folder)


def _require_whole(folder: Path, hashed: bool) -> None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
    except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
        raise BrokenCheckpoint(f"{folder} has no readable {MANIFEST}") from error
    if manifest.get("format") != _FORMAT:
        raise BrokenCheckpoint(f"{folder} is of format {manifest.get('format')}, this version reads {_FORMAT}")
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise BrokenCheckpoint(f"{path} is missing")
        if path.stat().st_size != facts["size"]:
            raise BrokenCheckpoint(f"{path} has {path.stat().st_size} bytes instead of {facts['size']}")
        if hashed and _hash(path) != facts["sha256"]:
            raise BrokenCheckpoint(f"{path} has been altered")


def _read_tree(folder: Path) -> Any:
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))


def refuse_other_run(what: str, root: Path, known: Mapping[str, Any]) -> None:
    """Refuse to continue another kind of run, by what is known before anything is loaded; reads no tensor.

    Args:
        what, root: as of :func:`find_checkpoint`.
        known: those fields of :class:`RunIdentity` that are known.

    Raises:
        UserError: naming what differs; if there is no checkpoint, or the named one is not whole.
    """

    def read(folder: Path) -> tuple[Path, Any]:
        _require_whole(folder, hashed=False)
        return folder, _read_tree(folder)["identity"]

    (folder, saved), _ = _find(what, root, read)
    _refuse_unlike(folder, saved, known)


def _refuse_unlike(folder: Path, saved: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    for name, value in known.items():
        if saved.get(name, value) != value:  # older checkpoints say less
            raise UserError(
                f"cannot resume from {folder}: its {name.replace('_', ' ')} is {saved[name]!r}, this run's is "
                f"{value!r}; give the same options, or start a new run"
            )


def find_checkpoint(what: str, root: Path) -> tuple[Checkpoint, list[str]]:
    """Return the checkpoint to resume from, and remarks on those that were passed over.

    Args:
        what: "latest" for the last whole one under ``root``, or a checkpoint's folder.
        root: folder of all checkpoints of the run.

    Raises:
        UserError: if there is none, or the named one is not whole.
    """
    return _find(what, root, read_checkpoint)


def _find(what: str, root: Path, read: Callable[[Path], T]) -> tuple[T, list[str]]:
    if what != "latest":
        folder = Path(what).expanduser()
        if not folder.is_dir():
            exist = ", ".join(path.name for path in list_checkpoints(root)) or "none"
            raise UserError(f"no checkpoint folder {folder}; in {root} there are: {exist}")
        try:
            return read(folder), []
        except BrokenCheckpoint as error:
            raise UserError(f"the checkpoint is not whole: {error}; 'latest' finds the last whole one") from error
    remarks: list[str] = []
    for folder in reversed(list_checkpoints(root)):
        try:
            return read(folder), remarks
        except BrokenCheckpoint as error:
            remarks.append(f"passed over a checkpoint that is not whole: {error}")
    raise UserError("; ".join([f"no whole checkpoint in {root}: nothing to resume from", *remarks]))


def find_together(what: str, root: Path, processes: Processes) -> tuple[Checkpoint, list[str]]:
    """Do as :func:`find_checkpoint` on all processes: the main one chooses and checks, the others read its choice.

    Raises:
        UserError: on every process if there is none; where one does not see what the main one has found.
    """
    found = processes.on_main(lambda: find_checkpoint(what, root))
    folder = processes.exchange(found[0].folder if found else None)[0]
    if found:
        return found
    assert folder is not None
    try:
        return read_checkpoint(folder, hashed=False), []
    except BrokenCheckpoint as error:
        raise UserError(
            f"process {processes.rank} cannot read the checkpoint: {error}; all must share the disk"
        ) from error


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    """Force a file, or a folder's entries, to disk; folders cannot be opened on Windows."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
