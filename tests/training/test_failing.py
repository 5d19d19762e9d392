"""What ends the main process alone ends all of them, so that none waits for it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffalign.errors import RunStopped, UserError
from diffalign.training import checkpoint, runfolder
from diffalign.training.observing import OnMain
from diffalign.training.runfolder import RunFolder
from diffalign.training.trackers import Tracker
from tests.meeting import Meeting, meet
from tests.training.support import toy_trainer


def fails(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any, **__: Any) -> Any:
        raise error

    return fail


class Quiet:
    """Sees nothing."""

    def before(self, folder: RunFolder) -> float | None:
        return None

    def during(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> float | None:
        return None

    def after(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> dict[str, Any]:
        return {}


FULL = OSError(errno.ENOSPC, "No space left on device")
Spoil = Callable[[Any, pytest.MonkeyPatch], None]


def no_records(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(runfolder.RunFolder, "_write_records", fails(FULL))


def no_checkpoint(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(checkpoint, "save_file", fails(FULL))


def no_tracker(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    trainer._trackers = [SimpleNamespace(log=fails(ConnectionError("the server is gone")), close=lambda: None)]


def no_grid(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    """The observers of all meet at what the main one does alone."""
    trainer._observer._observer = SimpleNamespace(before=fails(FULL))


def no_weights(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    trainer.ctx.policy.save = fails(UserError("cannot write the weights"))


def no_card(trainer: Any, patch: pytest.MonkeyPatch) -> None:
    trainer._folder.write_card = fails(FULL)


@pytest.mark.parametrize(
    ("spoil", "first", "second"),
    [
        (no_records, "cannot write to the run folder .*No space left", None),
        (no_checkpoint, "cannot write a checkpoint .*No space left", None),
        (no_tracker, "^the server is gone$", "process 0 failed with ConnectionError: the server is gone"),
        (no_grid, "cannot write to the run folder .*No space left", None),
        (no_weights, "cannot write the weights", None),
        (no_card, "cannot write to the run folder .*No space left", None),
    ],
)
def test_no_process_waits_for_one_that_has_ended(
    spoil: Spoil, first: str, second: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(processes: Meeting) -> None:
        trainer = toy_trainer(tmp_path / "run", steps=2, processes=processes)
        object.__setattr__(trainer._record, "card", lambda *_: "a card")
        trainer._observer = OnMain(Quiet(), processes)
        if processes.is_main:
            spoil(trainer, monkeypatch)
        kind = Exception if processes.is_main else UserError
        with pytest.raises(kind, match=first if processes.is_main else second or first):
            trainer.fit()

    meet(2, run)


def test_a_run_that_one_process_stops_is_saved_by_all() -> None:
    """Saving takes all of them: whoever is told of a stopped run takes part."""

    def work(processes: Meeting) -> type[Exception]:
        with pytest.raises(UserError, match="enough") as stopped:
            processes.on_main(fails(RunStopped("enough")))
        return stopped.type

    assert meet(2, work) == [RunStopped, RunStopped]
