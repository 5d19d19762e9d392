"""Runs of the real loop over the two-parameter model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import Tensor

from diffalign.strategies.base import Context
from diffalign.training.checkpoint import RunIdentity
from diffalign.training.config import OptimOptions, RunOptions
from diffalign.training.loop import RunRecord, Trainer
from diffalign.training.processes import Processes
from tests.interface.fakes import Fake, RunningStatistic
from tests.interface.toy import ToyPolicy, ToySource

OPTIM = OptimOptions(optimizer="adamw", lr_scheduler="cosine", lr_warmup_steps=2, use_ema=True, learning_rate=0.05)


def toy_trainer(
    folder: Path,
    strategy: Fake | None = None,
    *,
    steps: int = 10,
    optim: OptimOptions = OPTIM,
    source: Any = None,
    identity: RunIdentity | None = None,
    processes: Processes | None = None,
    **run: Any,
) -> Trainer:
    """Make a run of a fake method; ``run`` are options of the run."""
    processes = processes or Processes()
    strategy = strategy or RunningStatistic()
    ctx = Context(policy=ToyPolicy(), reduce=processes.sum, total_steps=steps, rank=processes.rank)
    strategy.build(ctx)
    return Trainer(
        strategy,
        ctx,
        source or ToySource(),
        processes,
        optim=optim,
        run=dataclasses.replace(RunOptions(guard_patience=3), **run),
        learning_rate=optim.learning_rate,
        folder=folder,
        record=RunRecord(identity or RunIdentity("fake", "toy", "lora", 0, ""), {"method": "fake", "seed": 0}),
    )


def everything(trainer: Trainer) -> dict[str, Tensor]:
    """Return all that a run must reproduce: weights, their average, the optimizer's moments, the method's state."""
    state = trainer._stepper.state_dict()
    moments = {
        f"{index}.{name}": value for index, values in state["optimizer"].items() for name, value in values.items()
    }
    average = {f"average.{name}": value for name, value in state["average"].items()}
    return {**trainer.trainables.state_dict(), **moments, **average, **trainer.strategy.state_dict()}
