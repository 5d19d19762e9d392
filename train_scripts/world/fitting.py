"""The optimisation shared by all training stages: AdamW, warm-up and cosine, averaged weights, resumable."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from train_scripts.world.workspace import Workspace

Loss = Callable[[int, torch.Generator], Tensor]
"""(step, generator of that step) -> scalar loss."""


@dataclass(frozen=True)
class FitSettings:
    """Constants of one training.

    Args:
        steps: optimizer steps.
        learning_rate: peak.
        warmup: steps of linear rise; a cosine falls to ``floor`` of the peak after it.
        floor: share of the peak at the end.
        weight_decay: of AdamW.
        ema_decay: final decay of the weight average; it rises to it as (step + 1) / (step + 10).
        seed: of all draws.
        save_every: steps between checkpoints.
    """

    steps: int
    learning_rate: float
    warmup: int = 200
    floor: float = 0.05
    weight_decay: float = 0.01
    ema_decay: float = 0.999
    seed: int = 0
    save_every: int = 200

    def scaled(self, workspace: Workspace) -> FitSettings:
        """Return the settings with the build's share of the steps."""
        return replace(self, steps=workspace.amount(self.steps))

    def rate(self, step: int) -> float:
        """Learning rate of a step."""
        rise = min(1.0, (step + 1) / max(1, self.warmup))
        fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))
        return self.learning_rate * rise * (self.floor + (1 - self.floor) * fall)


def fit(name: str, modules: Sequence[nn.Module], loss: Loss, settings: FitSettings, folder: Path) -> None:
    """Minimise a loss over the trainable parameters of some modules and leave the averaged weights in them.

    Args:
        name: for the log.
        modules: their parameters with ``requires_grad`` are trained.
        loss: all chance comes from the generator it is given, which depends on the step alone.
        settings: constants.
        folder: holds ``state.pt``; a build that was stopped continues from it.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    averages = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    start = _resume(folder / "state.pt", parameters, averages, optimizer)
    began, total = time.monotonic(), 0.0
    for step in range(start, settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        value = loss(step, torch.Generator().manual_seed(settings.seed * 1_000_003 + step))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(settings.ema_decay, (step + 1) / (step + 10))
        torch._foreach_lerp_(averages, [p.detach() for p in parameters], 1 - decay)
        total += value.item()
        if (step + 1) % 50 == 0:
            print(
                f"{name} {step + 1}/{settings.steps} loss {total / 50:.4f} {time.monotonic() - began:.0f}s", flush=True
            )
            total = 0.0
        if (step + 1) % settings.save_every == 0 or step + 1 == settings.steps:
            _save(folder / "state.pt", step + 1, parameters, averages, optimizer)
    for parameter, average in zip(parameters, averages, strict=True):
        parameter.data.copy_(average)


def _save(
    path: Path, step: int, parameters: list[nn.Parameter], averages: list[Tensor], optimizer: torch.optim.Optimizer
) -> None:
    state = {"step": step, "parameters": [p.detach() for p in parameters], "averages": averages}
    temporary = path.with_suffix(".tmp")
    torch.save({**state, "optimizer": optimizer.state_dict()}, temporary)
    os.replace(temporary, path)


def _resume(
    path: Path, parameters: list[nn.Parameter], averages: list[Tensor], optimizer: torch.optim.Optimizer
) -> int:
    """Load the last checkpoint, if there is one, and return the step to continue from."""
    if not path.is_file():
        return 0
    state = torch.load(path, weights_only=True)
    for parameter, average, saved, saved_average in zip(
        parameters, averages, state["parameters"], state["averages"], strict=True
    ):
        parameter.data.copy_(saved)
        average.copy_(saved_average)
    optimizer.load_state_dict(state["optimizer"])
    return int(state["step"])


def batches(count: int, size: int) -> Iterator[slice]:
    """Cut ``range(count)`` into slices of at most ``size``."""
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))
