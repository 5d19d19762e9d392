"""Runs a strategy on predictions that a golden file gives: its own kernel, heads and loss, no network."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from diffalign.batch import Condition, ImageBatch
from diffalign.diffusion.process import DiscreteProcess, NoiseProcess
from diffalign.references import Reference
from diffalign.strategies.base import Context, LossOutput, Strategy, Terms
from diffalign.strategies.pair_kernel import Noised

Predict = Callable[[Tensor, Tensor, Condition], Tensor]
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": None,
    "beta_start": None,
    "beta_end": None,
    "beta_schedule": {"scaled_linear"},
}
"""Parameters that describe a noise schedule, as ``GoldenCase.known`` takes them."""


class ScriptedPolicy:
    """Has of a policy what strategies call; the prediction is a function.

    Args:
        predict: (latents, timesteps, condition) -> prediction.
        process: its noise process, where the strategy asks for one.
        null: the row that stands for the empty caption, where guidance asks for one.
    """

    device = torch.device("cpu")

    def __init__(self, predict: Predict, process: NoiseProcess | None = None, null: Condition | None = None) -> None:
        self.predict = predict
        self.process = process
        self._null = null

    @contextmanager
    def inference(self) -> Iterator[None]:
        with torch.no_grad():
            yield

    def null_condition(self, rows: int) -> Condition:
        assert self._null is not None
        return self._null.select(torch.zeros(rows, dtype=torch.long))


class ScriptedReference(Reference):
    """A reference that is a scripted policy of its own."""

    identity = "scripted"

    def __init__(self, policy: ScriptedPolicy) -> None:
        self._policy = policy

    def _held(self) -> AbstractContextManager[ScriptedPolicy]:
        return nullcontext(self._policy)


def no_captions(rows: int) -> Condition:
    """A condition that says nothing."""
    return Condition({"nothing": torch.zeros(rows, 1)})


def scripted_batch(latents: Tensor, images: int = 2, fields: Mapping[str, Tensor] | None = None) -> ImageBatch:
    """A batch over given latents in block order."""
    size = len(latents) // images
    return ImageBatch(
        ids=[str(row) for row in range(size)],
        seeds=torch.arange(size),
        fields=fields or {},
        latents=latents,
        conditions=(no_captions(size),) * images,
    )


def evaluate(strategy: Strategy, ctx: Context, batch: ImageBatch, draws: Any) -> tuple[LossOutput, Terms]:
    """Go through the strategy's hooks after ``draw``, as the loop does."""
    parts = []
    for piece in strategy.pieces(ctx, batch, draws):
        with torch.no_grad():
            frozen = strategy.frozen(ctx, batch, draws, piece)
        parts.append(Terms(strategy.terms(ctx, batch, draws, piece), frozen))
    terms = Terms.join(parts, strategy.spec.piece_dim)
    return strategy.loss(terms, strategy.statistics(terms, ctx.reduce), batch), terms


def on_predictions(
    strategy: Strategy,
    policy_pred: Tensor,
    target: Tensor,
    ref_pred: Tensor | None = None,
    images: int = 2,
    fields: Mapping[str, Tensor] | None = None,
) -> tuple[LossOutput, Terms]:
    """Evaluate a strategy where the networks' outputs are given.

    Args:
        strategy: the method.
        policy_pred, target, ref_pred: (images * B, channels, ...) in block order.
        images: N, images of an example.
        fields: the batch's fields.
    """
    policy = ScriptedPolicy(lambda latents, timesteps, condition: policy_pred)
    reference = ScriptedReference(ScriptedPolicy(lambda latents, timesteps, condition: ref_pred))
    batch = scripted_batch(torch.zeros_like(target), images, fields)
    draws = Noised(batch.latents, torch.zeros(len(target), dtype=torch.long), target, batch.condition)
    return evaluate(strategy, Context(policy, reference), batch, draws)  # type: ignore[arg-type]


def discrete_process(params: Mapping[str, Any]) -> DiscreteProcess:
    """The process that a case's parameters describe."""
    names: Sequence[str] = (*SCHEDULE, "clip_sample", "set_alpha_to_one", "steps_offset", "prediction_type")
    return DiscreteProcess.from_scheduler_config({name: params[name] for name in names if name in params})
