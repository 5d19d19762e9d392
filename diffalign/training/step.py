"""One optimizer step: gradient, guards, clipping, learning rate, moving average."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from diffalign.errors import RunStopped
from diffalign.strategies.base import Context, Strategy, Update
from diffalign.training.config import OptimOptions
from diffalign.training.ema import MovingAverage
from diffalign.training.guards import Guards
from diffalign.training.optim import build_optimizer, clip_gradients, learning_rate_factor
from diffalign.training.processes import Processes
from diffalign.training.sharding import like
from diffalign.training.stopwatch import Stopwatch
from diffalign.training.trainables import Trainables
from diffalign.training.update import Account, GradientPass

AUTOCAST = {"no": None, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Option ``mixed_precision`` -> the type that products are computed in."""


@dataclass(frozen=True)
class StepResult:
    """Result of a step.

    Args:
        account: sums of this process, still on the device.
        loss: of the whole update.
        gradient_norm: before clipping.
        learning_rate: that was used.
        applied: False where a guard skipped the step.
    """

    account: Account
    loss: float
    gradient_norm: float
    learning_rate: float
    applied: bool


class Stepper:
    """Makes optimizer steps.

    Args:
        strategy, ctx: the method and what it sees.
        trainables: what is trained.
        options: of the optimizer.
        learning_rate: the peak rate.
        guards: judge every step.
        processes: all of them take each step together.
        stopwatch: where the time goes.
    """

    def __init__(
        self,
        strategy: Strategy,
        ctx: Context,
        trainables: Trainables,
        options: OptimOptions,
        learning_rate: float,
        guards: Guards,
        processes: Processes,
        stopwatch: Stopwatch,
    ) -> None:
        self._ctx = ctx
        self._trainables = trainables
        self._options = options
        self._peak = learning_rate
        self._guards = guards
        self._processes = processes
        self._watch = stopwatch
        self.optimizer = build_optimizer(trainables.groups, options, ctx.device)
        self.average = MovingAverage(trainables, options.ema_decay) if options.use_ema else None
        autocast = AUTOCAST[options.mixed_precision]
        self._scaler = torch.amp.GradScaler(ctx.device.type, enabled=autocast is torch.float16)
        self._gradient = GradientPass(strategy, ctx, trainables.parameters, processes, autocast, stopwatch)

    def __call__(self, update: Update | None) -> StepResult | None:
        """Take one step; all processes together. None if no process had an example.

        Raises:
            RunStopped: if the loss is not finite (the examples are named), or a guard has had enough.
        """
        self.optimizer.zero_grad(set_to_none=True)
        if update is not None and update.restart:
            self.optimizer.state.clear()
        scale = self._scaler.scale(torch.ones((), device=self._ctx.device)) if self._scaler.is_enabled() else 1.0
        account = self._gradient(update, scale)
        if not account.weight:
            return None
        with self._watch("optimizer"):
            return self._apply(account)

    def mixed(self) -> torch.autocast:
        """The run's mixed precision, for passes outside an update: what is sampled must be what is replayed."""
        return self._gradient.mixed()

    def _apply(self, account: Account) -> StepResult:
        # a loss may depend on no term; without any gradient the scaler has seen nothing that it could judge
        graded = any(parameter.grad is not None for parameter in self._trainables.parameters)
        if graded:
            self._scaler.unscale_(self.optimizer)
        norm = clip_gradients(self._trainables.groups, self._options.max_grad_norm)
        loss, gradient_norm = self._read(account, norm)
        if not math.isfinite(loss):
            names = [name for part in self._processes.exchange(account.offenders()) for name in part]
            raise RunStopped(
                f"the loss of step {self._ctx.step + 1} is not finite; examples: {', '.join(names) or 'none alone'}. "
                "Their images or captions are suspicious, or the learning rate is too high; no weight was changed"
            )
        verdict = self._guards.judge(loss, gradient_norm, scaler_adapts=self._scaler.get_scale() > 1)
        rate = self._peak * learning_rate_factor(self._ctx.step, self._ctx.total_steps, self._options)
        if verdict == "apply":
            for group in self.optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            if graded:
                self._scaler.step(self.optimizer)
            if self.average is not None:
                self.average.update(self._ctx.step + 1)
        if graded:
            self._scaler.update()
        return StepResult(account, loss, gradient_norm, rate, verdict == "apply")

    def _read(self, account: Account, norm: torch.Tensor) -> tuple[float, float]:
        """Bring loss and gradient norm to the host: the one synchronisation of a step."""
        total = account.sums.get("loss", torch.zeros((), device=self._ctx.device))
        total = self._processes.sum(total.reshape(1))[0] / account.weight
        wide = torch.promote_types(total.dtype, norm.dtype)
        loss, gradient_norm = torch.stack([total.to(wide), norm.to(total.device, wide)]).tolist()
        return loss, gradient_norm

    def state_dict(self) -> dict[str, Any]:
        """Optimizer, moving average, gradient scaler and guards."""
        return {
            "optimizer": self.optimizer.state_dict()["state"],
            "average": self.average.state_dict() if self.average else {},
            "scaler": self._scaler.state_dict(),
            "guards": self._guards.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, after the weights: an average that is new begins at them."""
        groups = self.optimizer.state_dict()["param_groups"]
        saved = {int(index): values for index, values in state["optimizer"].items()}
        parameters = self._trainables.parameters
        moments = {index: _moments(values, parameters[index]) for index, values in saved.items()}
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        if self.average is not None:
            self.average.load_state_dict(state["average"] or self._trainables.state_dict())
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self._guards.load_state_dict(state["guards"])


def _moments(values: Mapping[str, Any], parameter: torch.nn.Parameter) -> dict[str, Any]:
    """Bring the optimizer's state of a parameter, read from a file, into shards where the parameter is."""
    shaped = (name for name, value in values.items() if getattr(value, "shape", None) == parameter.shape)
    return {**values, **{name: like(values[name], parameter) for name in shaped}}
