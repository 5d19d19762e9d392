"""Tells people and files how a run goes: metrics, trackers, the bar, the forecast."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from diffalign.data.schema import describe_notes
from diffalign.strategies.base import Progress
from diffalign.training.metrics import Metrics, rounded
from diffalign.training.processes import Processes
from diffalign.training.progress import WARM_UP, ProgressDisplay
from diffalign.training.step import StepResult
from diffalign.training.stopwatch import Stopwatch
from diffalign.training.trackers import Tracker

PATIENCE = 5
"""Logging intervals in a row with the same advice after which it is given."""


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


class LeftOut:
    """What of a stream cannot be used, over all processes: told whenever it has doubled, and at the end of a run.

    Args:
        count: counts what this process could not use so far; None where that was told before the first step.
        processes: whose counts are summed.
    """

    def __init__(self, count: Callable[[], Mapping[str, int]] | None, processes: Processes) -> None:
        self._count, self._processes = count, processes
        self._told = 0

    def lines(self, only_news: bool = False) -> list[str]:
        """Say it in a line, or in none where there is nothing to say; all processes call it together.

        Args:
            only_news: nothing unless there is at least twice as much as the last time.
        """
        if self._count is None:
            return []
        total: Counter[str] = Counter()
        for counts in self._processes.exchange(dict(self._count())):
            total.update({reason: count for reason, count in counts.items() if count})
        if only_news and total.total() < max(1, 2 * self._told):
            return []
        self._told = total.total()
        return [f"of the stream so far: {describe_notes(total)}"]


class Reporter:
    """Receives every step.

    Args:
        processes: all of them report together.
        trackers: of the main process; none elsewhere.
        display: what is seen.
        stopwatch: measured exactly until the forecast is made.
        spent: by the run so far.
        left_out: of the data so far.
        logging_steps: length of a logging interval.
        first, total: optimizer steps done before, and planned.
        advise: the method's own look at the metrics of an interval, see ``Strategy.advise``.
    """

    def __init__(
        self,
        processes: Processes,
        trackers: Sequence[Tracker],
        display: ProgressDisplay,
        stopwatch: Stopwatch,
        spent: Spent,
        left_out: LeftOut,
        logging_steps: int,
        first: int,
        total: int,
        advise: Callable[[Mapping[str, float]], str] = lambda metrics: "",
    ) -> None:
        self._processes, self._trackers, self._display, self._watch = processes, trackers, display, stopwatch
        self._interval, self._first, self._total = logging_steps, first, total
        self._averages, self._spent, self._left_out = Metrics(processes), spent, left_out
        self._examples, self._seconds = 0.0, 0.0
        self._advise, self._advice, self._repeated = advise, "", 0
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
            result: of the step.
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
            for line in self._left_out.lines(only_news=True):
                self._display.note(f"note: {line}")
            self._listen(self._advise(self.metrics))
        self._display.step(step, self.metrics if ended else None)
        if step - self._first == WARM_UP:
            self._display.forecast(self._watch, self._examples, self._seconds, self._total - step)
            self._watch.exact = False

    def _listen(self, advice: str) -> None:
        """Pass advice on, once, where it has held for some intervals."""
        self._repeated = self._repeated + 1 if advice == self._advice else 1
        self._advice = advice
        if advice and self._repeated == PATIENCE:
            self._display.note(f"note: for {PATIENCE} logging intervals {advice}")

    def _log(self, step: int) -> None:
        for tracker in self._trackers:
            tracker.log(step, self.metrics)
