"""Where the time of a run goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums wall time by section; sections do not nest.

    Args:
        device: an accelerator that is waited for at the end of each section while :attr:`exact` holds; work is
            queued there, so that without waiting the time would land on whatever waits first.
    """

    def __init__(self, device: torch.device | None = None) -> None:
        self._device = device
        self.exact = False
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, section: str) -> Iterator[None]:
        """Count the body's time towards a section."""
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.exact and self._device is not None and self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.seconds[section] += time.perf_counter() - start

    def shares(self) -> dict[str, float]:
        """Share of each section in the time of all, largest first."""
        total = sum(self.seconds.values()) or 1.0
        return {name: t / total for name, t in sorted(self.seconds.items(), key=lambda item: -item[1])}
