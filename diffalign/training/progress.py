"""What a person sees while a run goes on."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from diffalign.training.stopwatch import Stopwatch

_LINES = 10
"""Lines printed over a run where there is no terminal to draw a bar on."""
_SHOWN = {"loss": "loss", "implicit_accuracy": "accuracy", "reward": "reward", "examples_per_second": "samples/s"}
_QUIET_SECONDS = 30.0
"""Between two lines about work before the first step, where there is no terminal."""
WARM_UP = 20
"""Steps that are measured before the run says how long it will take."""


def peak_memory_bytes(device: torch.device) -> int:
    """Largest memory used so far: of the accelerator, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return 0
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def work_shown(console: Console | None) -> Iterator[Callable[[str, int, int], None]]:
    """Show how far work before the first step is: bars that go at the end; without a terminal a line now and then.

    Args:
        console: where to; None shows nothing.

    Yields:
        what is told (what is done, how many are done, how many there are).
    """
    if console is None:
        yield lambda what, done, total: None
    elif console.is_terminal:
        columns = (TextColumn("{task.description}"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bars:
            tasks: dict[str, TaskID] = {}

            def draw(what: str, done: int, total: int) -> None:
                if what not in tasks:
                    tasks[what] = bars.add_task(what)
                bars.update(tasks[what], completed=done, total=total)

            yield draw
    else:
        last = time.monotonic()

        def tell(what: str, done: int, total: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _QUIET_SECONDS:
                last = time.monotonic()
                console.print(f"{what}: {done} of {total}", highlight=False, soft_wrap=True)

        yield tell


class ProgressDisplay:
    """A bar with loss, implicit accuracy, samples/s and memory; plain lines where the output is no terminal.

    Args:
        total: optimizer steps of the run.
        start: steps done before, after a resume.
        device: whose memory is shown.
        console: where to; None shows nothing (processes other than the main one).
    """

    def __init__(self, total: int, start: int, device: torch.device, console: Console | None) -> None:
        self._total, self._device, self._console = total, device, console
        self._bar: Progress | None = None
        self._every = max(1, total // _LINES)
        if console is not None and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[text]}"),
            )
            self._bar = Progress(*columns, console=console)
            self._task = self._bar.add_task("step", total=total, completed=start, text="")
            self._work = self._bar.add_task("", visible=False, text="")

    def __enter__(self) -> ProgressDisplay:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._bar is not None:
            self._bar.stop()

    def step(self, step: int, values: Mapping[str, float] | None) -> None:
        """Show a step; ``values`` where a logging interval ended with it."""
        text = None
        if values is not None:
            parts = [f"{label} {values[name]:.4g}" for name, label in _SHOWN.items() if name in values]
            text = "  ".join([*parts, f"memory {peak_memory_bytes(self._device) / 2**30:.2f} GiB"])
        if self._bar is not None:
            self._bar.update(self._task, completed=step)
            if text:
                self._bar.update(self._task, text=text)
        elif self._console is not None and text and (step % self._every == 0 or step in (1, self._total)):
            self._console.print(f"step {step}/{self._total}  {text}", highlight=False, soft_wrap=True)

    def work(self, what: str, done: int, total: int) -> None:
        """Show how far work within a step is, such as a rollout; the line goes when it is done."""
        if self._bar is not None:
            self._bar.update(self._work, description=what, completed=done, total=total, visible=done < total)

    def note(self, text: str) -> None:
        """Print a line that stays."""
        if self._console is not None:
            self._console.print(text, highlight=False, soft_wrap=True)

    def forecast(self, watch: Stopwatch, examples: float, seconds: float, steps_left: int) -> None:
        """After the warm-up: measured speed, hours to go, peak memory, and where the time goes."""
        if self._console is None or seconds <= 0:
            return
        left = seconds / WARM_UP * steps_left
        shares = ", ".join(f"{name} {share:.0%}" for name, share in watch.shares().items() if share >= 0.005)
        self.note(
            f"measured over {WARM_UP} steps: {examples / seconds:.3g} examples/s, about "
            f"{left / 3600:.2g} h to go, peak memory {peak_memory_bytes(self._device) / 2**30:.2f} GiB; time: {shares}"
        )
