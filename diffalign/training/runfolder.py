"""The folder of a run: who owns it, and what is recorded there besides weights and metrics."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import UserError

CONFIG_FILE = "config.yaml"
_RUNS = Path("runs")
_PACKAGES = ("diffalign", "torch", "diffusers", "transformers", "accelerate", "peft", "safetensors", "datasets")


def choose_folder(output_dir: str, method: str, resume: str | None) -> Path:
    """Return the folder of a run without making it.

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
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            owner = _owner(folder)
            what = f"a run of {owner!r}" if owner else "other files"
            raise UserError(
                f"--output_dir {folder} already holds {what}: choose another folder"
                + (", or continue that run with --resume_from_checkpoint latest" if owner else "")
            )
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
            raise UserError(f"cannot write to the run folder {self.path}: {error}") from error

    def _write_records(self, config: Mapping[str, Any]) -> None:
        (self.path / CONFIG_FILE).write_text(yaml.safe_dump(dict(config), sort_keys=False))
        (self.path / "environment.json").write_text(json.dumps(environment(), indent=1) + "\n")

    def write_card(self, card: str) -> None:
        """Write the model card."""
        (self.path / "README.md").write_text(card)


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


def model_card(method: str, paper: str, library: str, config: Mapping[str, Any], results: Mapping[str, Any]) -> str:
    """Return the text of a run's README.

    Args:
        method, paper: the method's name and its source.
        library: which library loads the result.
        config: the resolved options.
        results: figures measured at the end; may be empty.
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
        f"Trained with diffalign's `{method}` ({paper or 'no paper'}).",
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
    while (_RUNS / f"{method}-{number:03d}").exists():
        number += 1
    return _RUNS / f"{method}-{number:03d}"


def _owner(folder: Path) -> str | None:
    """Return the method of the run that a folder holds."""
    try:
        values = yaml.safe_load((folder / CONFIG_FILE).read_text())
        return str(values["method"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None


def _git_revision() -> str | None:
    here = Path(__file__).resolve().parent
    try:
        result = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip()
