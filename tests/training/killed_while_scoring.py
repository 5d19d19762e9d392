"""A training in a process of its own that is killed, with no chance to save, while its third rollout is scored."""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

from torch import Tensor

from diffalign.cli.main import main
from diffalign.rewards.jpeg import JpegSize

score, calls = JpegSize.score, []


def dying(self: JpegSize, *args: Any, **kwargs: Any) -> Tensor:
    """Score twice, then die."""
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return score(self, *args, **kwargs)


if __name__ == "__main__":
    JpegSize.score = dying  # type: ignore[method-assign]
    main(["train", *sys.argv[1:]])
