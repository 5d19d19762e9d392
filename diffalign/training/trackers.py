"""Where metrics are written: always ``metrics.jsonl``, and trackers by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from diffalign.errors import UserError, unknown

METRICS_FILE = "metrics.jsonl"


class Tracker(Protocol):
    """Receives the metrics of each logging interval."""

    def log(self, step: int, values: Mapping[str, float]) -> None: ...

    def image(self, step: int, name: str, path: Path) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """One JSON object a line, flushed as it is written.

    Args:
        path: the file; it is continued if it exists.
        resumed_from: drop the lines of later steps, which the resumed run will write again.
    """

    def __init__(self, path: Path, resumed_from: int = 0) -> None:
        if path.exists():
            whole = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= resumed_from]
            path.write_text("".join(f"{line}\n" for line in whole), encoding="utf-8")
        self._file = path.open("a", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()

    def image(self, step: int, name: str, path: Path) -> None:
        """Pictures lie in the run folder already."""

    def close(self) -> None:
        self._file.close()


class TensorBoard:
    """TensorBoard event files in ``folder/tensorboard``.

    Args:
        folder: the run folder.
        resumed_from: curves of an interrupted run end here; later steps will be written again.
    """

    def __init__(self, folder: Path, resumed_from: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=resumed_from + 1 if resumed_from else None)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def image(self, step: int, name: str, path: Path) -> None:
        import numpy as np
        from PIL import Image

        self._writer.add_image(name, np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class WandB:
    """Weights & Biases; offline where the environment says so (``WANDB_MODE=offline``).

    Args:
        folder: the run folder; the id of the run is kept there, so that a resumed run continues its curves.
        config: all options.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any]) -> None:
        require_trackers(["wandb"])
        import wandb

        record = folder / "wandb" / "id.txt"
        known = record.read_text(encoding="utf-8").strip() if record.is_file() else None
        self._wandb = wandb
        self._run = wandb.init(
            project="diffalign", name=folder.name, dir=str(folder), config=dict(config), id=known, resume="allow"
        )
        record.parent.mkdir(exist_ok=True)
        record.write_text(f"{self._run.id}\n", encoding="utf-8")

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def image(self, step: int, name: str, path: Path) -> None:
        self._run.log({name: self._wandb.Image(str(path))}, step=step)

    def close(self) -> None:
        self._run.finish()


class CallbackTracker:
    """Passes metrics on to a function.

    Args:
        function: called with (step, metrics).
    """

    def __init__(self, function: Callable[[int, Mapping[str, float]], object]) -> None:
        self._function = function

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._function(step, values)

    def image(self, step: int, name: str, path: Path) -> None:
        """Pictures lie in the run folder."""

    def close(self) -> None:
        """Nothing is open."""


def require_trackers(names: Sequence[str]) -> None:
    """Refuse trackers whose packages are not installed.

    Raises:
        UserError: naming the package.
    """
    if "wandb" in names:
        try:
            import wandb  # noqa: F401
        except ImportError:
            raise UserError("--report_to wandb needs the package 'wandb'; install it with: pip install wandb") from None


def build_trackers(
    names: Sequence[str], folder: Path, config: Mapping[str, Any], resumed_from: int = 0
) -> list[Tracker]:
    """Make the trackers of a run; the JSON lines are always among them.

    Raises:
        UserError: for an unknown name or a package that is not installed.
    """
    trackers: list[Tracker] = [JsonLines(folder / METRICS_FILE, resumed_from)]
    for name in names:
        if name == "tensorboard":
            trackers.append(TensorBoard(folder, resumed_from))
        elif name == "wandb":
            trackers.append(WandB(folder, config))
        else:
            raise unknown("tracker", name, ["tensorboard", "wandb"])
    return trackers


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return float("inf")  # half a line, from a run that was killed while writing it
