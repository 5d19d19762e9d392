"""What stops a run that has gone wrong, before it wastes a night: zeros, non-finite numbers, spikes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any, Literal

from diffalign.errors import RunStopped

_WINDOW = 100
_ENOUGH = 20


Verdict = Literal["apply", "skip"]


class Guards:
    """Judges every step before it is applied.

    Args:
        patience: stop after so many consecutive steps with a zero or non-finite loss or gradient.
        spike_factor: skip a step whose gradient norm exceeds this multiple of its median over the last 100 applied
            steps (20 at least); 0 never does.
        max_skipped: stop after so many skipped steps.
        waived: names of guards ("zero_gradient", "zero_loss", "spike") that a method switches off, and why.
    """

    def __init__(
        self, patience: int, spike_factor: float, max_skipped: int, waived: Mapping[str, str] | None = None
    ) -> None:
        self._patience = patience
        self._spike_factor = spike_factor
        self._max_skipped = max_skipped
        self._waived = waived or {}
        self._norms: deque[float] = deque(maxlen=_WINDOW)
        self._in_a_row: dict[str, int] = {}
        self.skipped = 0

    def judge(self, loss: float, gradient_norm: float, scaler_adapts: bool = False) -> Verdict:
        """Say whether to apply the step.

        Args:
            loss: of the whole update, finite (a non-finite one stops the run elsewhere, by the examples' names).
            gradient_norm: before clipping.
            scaler_adapts: a float16 gradient scaler is about to lower its scale, which mends overflows.

        Raises:
            RunStopped: with advice.
        """
        finite = math.isfinite(gradient_norm)
        self._count("zero_loss", loss == 0, "the loss is exactly 0")
        self._count("zero_gradient", gradient_norm == 0, "the gradient is exactly 0")
        self._count("non_finite_gradient", not finite and not scaler_adapts, "the gradient is not finite")
        if not finite:
            return "skip"
        if self._is_spike(gradient_norm):
            self.skipped += 1
            if self.skipped >= self._max_skipped:
                raise RunStopped(
                    f"{self.skipped} steps were skipped because their gradient norm (now {gradient_norm:.3g}) exceeds "
                    f"{self._spike_factor:g} times its median: lower --learning_rate, or keep the model closer to the "
                    "reference (a higher beta); --spike_factor 0 switches this guard off"
                )
            return "skip"
        self._norms.append(gradient_norm)
        return "apply"

    def state_dict(self) -> dict[str, Any]:
        """What later judgements depend on."""
        return {"norms": list(self._norms), "in_a_row": dict(self._in_a_row), "skipped": self.skipped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._norms = deque(state["norms"], maxlen=_WINDOW)
        self._in_a_row = dict(state["in_a_row"])
        self.skipped = state["skipped"]

    def _count(self, name: str, happened: bool, what: str) -> None:
        self._in_a_row[name] = self._in_a_row.get(name, 0) + 1 if happened else 0
        if name not in self._waived and self._in_a_row[name] >= self._patience:
            raise RunStopped(
                f"{what} for {self._patience} consecutive steps: nothing is being learned. Look at the data (identical "
                "images, labels that are all equal), at --learning_rate and at the method's beta; "
                "--guard_patience sets how long to wait"
            )

    def _is_spike(self, norm: float) -> bool:
        if not self._spike_factor or "spike" in self._waived or len(self._norms) < _ENOUGH:
            return False
        return norm > self._spike_factor * median(self._norms)
