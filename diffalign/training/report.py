"""Tells people and files how a run goes: metrics, trackers, the bar, the forecast."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from diffalign.strategies.base import Progress
from diffalign.training.metrics import Metrics, rounded
from diffalign.training.processes import Processes
from diffalign.training.progress import WARM_UP, ProgressDisplay
from diffalign.training.step import StepResult
from diffalign.training.stopwatch import Stopwatch
from diffalign.training.trackers import Tracker

FLAT_INTERVALS = 5
"""Logging intervals without any difference of rewards after which a note says so."""


class Spent:
    """What a run has cost so far, over all processes and all its sessions.

    Args:
        progress: counts the images that this process samples.
        processes: whose images are summed.
    """

    def __init__(self, progress: Progress, processes: Processes) -> None:
        self._progress, self._processes = progress, processes
        self.seconds = 0.0

    def state_dict(self) -> dict[str, float]:
        """Seconds of training, and images sampled by all processes; all call it together."""
        return {"seconds": self.seconds, "images": sum(self._processes.exchange(self._progress.images))}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.seconds = state["seconds"]
        self._progress.images = int(state["images"]) if self._processes.is_main else 0


class Reporter:
    """Receives every step.

    Args:
        processes: all of them report together.
        trackers: of the main process; none elsewhere.
        display: what is seen.
        stopwatch: measured exactly until the forecast is made.
        spent: by the run so far.
        logging_steps: length of a logging interval.
        first, total: optimizer steps done before, and planned.
    """

    def __init__(
        self,
        processes: Processes,
        trackers: Sequence[Tracker],
        display: ProgressDisplay,
        stopwatch: Stopwatch,
        spent: Spent,
        logging_steps: int,
        first: int,
        total: int,
    ) -> None:
        self._processes, self._trackers, self._display, self._watch = processes, trackers, display, stopwatch
        self._interval, self._first, self._total = logging_steps, first, total
        self._averages, self._spent = Metrics(processes), spent
        self._examples, self._seconds = 0.0, 0.0
        self._flat_intervals = 0
        self.metrics: dict[str, float] = {}
        stopwatch.exact = True
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave what happened since the last step out of all speeds (validation, checkpoints)."""
        self._mark = time.perf_counter()

    def step(self, step: int, result: StepResult) -> None:
        """Report a step; all processes together.

        Args:
            step: optimizer steps done, this one included.
            result: what it came to.
        """
        now = time.perf_counter()
        seconds, self._mark = now - self._mark, now
        self._averages.add(result, seconds)
        self._examples += result.account.weight
        self._seconds += seconds
        self._spent.seconds += seconds
        ended = step % self._interval == 0 or step == self._total
        if ended:
            spent = {name: value for name, value in self._spent.state_dict().items() if value}  # few methods sample
            self.metrics = rounded({**self._averages.read(), **spent})
            self._processes.on_main(lambda: self._log(step))
            self._flat_intervals = self._flat_intervals + 1 if self.metrics.get("flat_groups") == 1 else 0
            if self._flat_intervals == FLAT_INTERVALS:
                self._display.note(
                    f"note: for {FLAT_INTERVALS} logging intervals all images of a caption have had the same reward, "
                    "so nothing is learned: take a graded reward, more images a caption, or harder captions"
                )
        self._display.step(step, self.metrics if ended else None)
        if step - self._first == WARM_UP:
            self._display.forecast(self._watch, self._examples, self._seconds, self._total - step)
            self._watch.exact = False

    def _log(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.log(step, self.metrics)
