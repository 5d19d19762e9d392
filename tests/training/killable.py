"""A run in a process of its own that leaves its killer time to kill it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from tests.interface.fakes import RunningStatistic
from tests.training.support import toy_trainer


class Slow(RunningStatistic):
    """Takes its time."""

    def after_step(self, ctx) -> None:  # type: ignore[no-untyped-def]
        time.sleep(0.02)


if __name__ == "__main__":
    resume = "latest" if sys.argv[2] == "resume" else None
    toy_trainer(Path(sys.argv[1]), Slow(), steps=40, checkpointing_steps=1, resume_from_checkpoint=resume).fit()
