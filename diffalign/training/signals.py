"""SIGTERM and SIGINT end a run in an orderly way: the step is finished, a checkpoint and the weights are written.

A run that was stopped is not a finished one, so its exit status is what a shell reports of a program that the signal
itself has ended: 128 and the signal's number, 143 for SIGTERM and 130 for SIGINT.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


def exit_status(interrupted: str | None) -> int:
    """Return the exit status of a run: 0 of one that came to its end, else 128 and the number of the named signal."""
    return 0 if interrupted is None else 128 + signal.Signals[interrupted].value


class StopRequest:
    """While entered, the first signal only raises a flag; a second SIGINT interrupts at once.

    Signals reach the main thread alone: elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *exception: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number).name
