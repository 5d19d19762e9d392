"""The folder of a run: who owns it, and what is recorded there besides weights and metrics."""

from __future__ import annotations

import errno
import json
import os
import platform
import shutil
import subprocess
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import yaml

from diffalign.errors import UserError
from diffalign.records import read_yaml
from diffalign.training.checkpoint import list_checkpoints
from diffalign.training.processes import Processes

T = TypeVar("T")

CONFIG_FILE = "config.yaml"
_RUNS = Path("runs")
_PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "datasets")

_UNWRITABLE = {getattr(errno, name, errno.ENOSPC) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES")}
_RECORDS = {CONFIG_FILE, "environment.json", "before.json", "metrics.jsonl"}
_LEFT_OVER = _RECORDS | {"tensorboard", "wandb", "validation", "checkpoints"}
"""What a run may have written before its first checkpoint."""


class Claim:
    """A run's hold on its folder, for as long as the run is built and trains.

    The folder itself is locked (``flock``), which ends with the process however that ends and leaves no file. Releasing
    removes the folder if the claim made it and nothing came into it.

    Args:
        path: the folder.
        made: the claim has made it.
        handle: the locked folder, open; None where there is no lock.
    """

    def __init__(self, path: Path, made: bool = False, handle: int | None = None) -> None:
        self.path = path
        # also called when nobody holds the claim any more: a trainer that was built and never run
        self.release = weakref.finalize(self, _release, path.absolute() if made else None, handle)

    @contextmanager
    def released(self, always: bool = True) -> Iterator[None]:
        """Release the claim at the end, or at a failure only."""
        try:
            yield
        except BaseException:
            self.release()
            raise
        if always:
            self.release()


def claim_folder(output_dir: str, method: str, resume: str | None) -> Claim:
    """Choose the folder of a run as :func:`choose_folder` does and make it its own.

    Of new runs that start together one gets a folder; the others get the next number, or are refused where
    ``output_dir`` names it. What a run left there that ended before its first checkpoint is removed. A run is continued
    once at a time.

    Raises:
        UserError: as :func:`choose_folder`; if another run has the folder, or it cannot be written.
    """
    if resume is not None:
        folder = choose_folder(output_dir, method, resume)
        return Claim(folder, handle=_lock(folder, "end that run first, or wait for it"))
    try:
        while True:
            folder = choose_folder(output_dir, method, None)
            try:
                folder.mkdir(parents=True)
                made = True
            except FileExistsError:
                if not output_dir:
                    continue  # another run was faster: the next number
                made = False
            return _locked(folder, method, made)
    except OSError as error:
        raise UserError(f"cannot write to the run folder {output_dir or _RUNS}: {error}") from error


def choose_folder(output_dir: str, method: str, resume: str | None) -> Path:
    """Return the folder of a run without making it.

    A new run may have a folder where one of its method ended before its first checkpoint.

    Args:
        output_dir: as given; empty for the next free ``runs/<method>-NNN``.
        method: the method's name.
        resume: as given: None, "latest", or a checkpoint's folder.

    Raises:
        UserError: if the folder belongs to another run, or there is none to resume.
    """
    if resume is None:
        if not output_dir:
            return _next_free(method)
        folder = Path(output_dir).expanduser()
        _refuse_if_used(folder, method)
        return folder
    if output_dir:
        folder = Path(output_dir).expanduser()
    elif resume != "latest":
        folder = Path(resume).expanduser().resolve().parent.parent
    else:
        raise UserError("--resume_from_checkpoint latest needs the run's --output_dir")
    owner = _owner(folder)
    if owner is None:
        raise UserError(f"nothing to resume: {folder} is not the folder of a run (no {CONFIG_FILE} there)")
    if owner != method:
        raise UserError(f"{folder} is a run of method {owner!r}: it cannot be continued with {method!r}")
    return folder


class RunFolder:
    """Paths of a run, and its records; nothing is on disk before :meth:`record`.

    Args:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    @property
    def validation(self) -> Path:
        """Where validation grids go."""
        return self.path / "validation"

    def record(self, config: Mapping[str, Any]) -> None:
        """Make the folder; write the resolved configuration, all versions and the revision of the code.

        Raises:
            UserError: if that cannot be written.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._write_records(config)
        except OSError as error:
            raise self._unwritable(error) from error

    def on_main(self, processes: Processes, work: Callable[[], T]) -> T | None:
        """Let the main process alone write, or do what else can fail.

        Returns:
            the result on the main process, None on the others.

        Raises:
            UserError: on every process where it fails, so that none waits; no space or permission names the folder.
        """

        def guarded() -> T:
            try:
                return work()
            except OSError as error:  # broken connections are of this class, too
                if error.errno not in _UNWRITABLE:
                    raise
                raise self._unwritable(error) from error

        return processes.on_main(guarded)

    def _unwritable(self, error: OSError) -> UserError:
        return UserError(f"cannot write to the run folder {self.path}: {error}")

    def _write_records(self, config: Mapping[str, Any]) -> None:
        (self.path / CONFIG_FILE).write_text(yaml.safe_dump(dict(config), sort_keys=False), encoding="utf-8")
        (self.path / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n", encoding="utf-8")

    def write_card(self, card: str) -> None:
        """Write the model card."""
        (self.path / "README.md").write_text(card, encoding="utf-8")


def environment() -> dict[str, Any]:
    """Versions of Python and packages, the platform, and the code's git revision where there is one."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": versions,
        "git_revision": _git_revision(),
    }


def model_card(
    method: str,
    paper: str,
    library: str,
    config: Mapping[str, Any],
    results: Mapping[str, Any],
    steps: int,
    planned_steps: int,
) -> str:
    """Return the text of a run's README.

    Args:
        method, paper: the method's name and its source.
        library: which library loads the result.
        config: the resolved options.
        results: figures measured at the end; may be empty.
        steps, planned_steps: optimizer steps behind the weights, and those that the run was to take.
    """
    base = config["pretrained_model_name_or_path"]
    shown = ("dataset_name", "max_train_steps", "learning_rate", "rank", "global_batch_pairs", "seed")
    lines = [
        "---",
        f"library_name: {library}",
        f"base_model: {base}",
        "tags: [diffalign, alignment, preference-optimisation]",
        "---",
        f"# {base}, aligned with {method}",
        "",
        f"Trained with diffalign's `{method}` ({paper or 'no paper'}) for {steps} of {planned_steps} optimizer steps.",
        "",
        "| option | value |",
        "|---|---|",
        *[f"| {name} | {config[name]} |" for name in shown if name in config],
        "",
        "Configuration: `config.yaml`; versions: `environment.json`; training curve: `metrics.jsonl`.",
    ]
    if results:
        lines += ["", "## Measured", "", "```json", json.dumps(dict(results), indent=1), "```"]
    return "\n".join(lines) + "\n"


def _next_free(method: str) -> Path:
    number = 1
    while os.path.lexists(_RUNS / f"{method}-{number:03d}"):  # a broken link is in the way, too
        number += 1
    return _RUNS / f"{method}-{number:03d}"


def _locked(folder: Path, method: str, made: bool) -> Claim:
    """Lock a folder that is there, and clear it of what a failed run has left."""
    claim = Claim(folder, made, handle := _lock(folder, "choose another folder"))
    with claim.released(always=False):
        if not made:  # only under the lock does it stay as it is seen
            _refuse_if_used(folder, method, may_clear=handle is not None)
            if not os.access(folder, os.W_OK | os.X_OK):
                raise PermissionError("no permission to write")
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return claim


def _lock(folder: Path, advice: str) -> int | None:
    """Lock a folder until its handle is closed; return None where the system cannot.

    Raises:
        UserError: if a run has it; ``advice`` says what to do then.
    """
    if sys.platform == "win32":
        return None
    import fcntl

    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(handle)
        raise UserError(f"--output_dir {folder} is in use by a run that is going on: {advice}") from error
    except OSError:  # some network file systems lock nothing
        os.close(handle)
        return None
    return handle


def _release(made: Path | None, handle: int | None) -> None:
    if made is not None:
        with suppress(OSError):  # not empty: the run has opened
            made.rmdir()
    if handle is not None:
        os.close(handle)


def _refuse_if_used(folder: Path, method: str, may_clear: bool = True) -> None:
    """Refuse a folder that holds anything but what a run of the method left before its first checkpoint."""
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    owner = _owner(folder)
    unsaved = owner == method and names <= _LEFT_OVER and not list_checkpoints(folder / "checkpoints")
    if not names or (unsaved and may_clear):
        return
    what = f"a run of {owner!r}" if owner else "other files"
    raise UserError(
        f"--output_dir {folder} already holds {what}: choose another folder"
        + (", or continue that run with --resume_from_checkpoint latest" if owner else "")
    )


def _owner(folder: Path) -> str | None:
    """Return the method of the run that a folder holds."""
    try:
        return str(read_yaml(folder / CONFIG_FILE)["method"])
    except (UserError, KeyError, TypeError):
        return None


def _git_revision() -> str | None:
    """Return the revision of the checkout that holds this code; None for an installed package, whatever encloses it."""
    here = Path(__file__).resolve()

    def git(*words: str) -> str:
        command = ["git", *words]
        return subprocess.run(
            command, cwd=here.parent, capture_output=True, text=True, timeout=5, check=True
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails where this file is not part of the repository
        return git("rev-parse", "HEAD")
    except (OSError, subprocess.SubprocessError):
        return None
