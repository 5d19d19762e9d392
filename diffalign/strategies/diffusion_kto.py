"""Diffusion-KTO: likes and dislikes of single images, no pairs.

Paper: Li et al., "Aligning Diffusion Models by Optimizing Human Utility", NeurIPS 2024, arXiv 2404.04465.
Official code: https://github.com/jacklishufan/diffusion-kto.

Every image has a timestep and noise of its own. With err and ref_err the mean squared errors of policy and reference
over the elements of an image, w = +1 for a liked and -1 for a disliked one::

    g_i  = ref_err_i - err_i                              what the policy gained over the reference
    q    = max(0, mean g)                                 reference point, no gradient
    loss = mean_i lambda_i (1 - U(w_i beta (g_i - q)))    U = sigmoid, lambda = weight of the label

beta multiplies a difference of MEANS over elements, without the factor 1/2 of Diffusion-DPO; for sums over n elements
it would be beta / n. The target is what the model predicts: epsilon and v as published, velocity for flow (ours).

Departures:

- q is a mean over the whole optimizer step and all processes, so that neither accumulation nor the number of processes
  changes the loss. The official code takes it over one micro-batch of all processes: ``reference_scope: micro_batch``.
- With ``mismatched`` an image meets the caption of another image of its process in the optimizer step, the nearest one
  before it that differs; in the official code that of its neighbour in the micro-batch, whatever it says. Where a last,
  smaller step leaves an image alone, it meets the empty caption.
- Every image is seen once an epoch. The official sampler draws liked images four times in five: where they are a share
  s of the data, ``weight_liked`` 0.8 / s and ``weight_disliked`` 0.2 / (1 - s) weigh the gradients alike in the mean.
- Captions stay; the official code drops a fifth of them: ``--caption_dropout 0.2``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffalign.batch import Condition, ImageBatch
from diffalign.errors import UserError
from diffalign.strategies.base import Context, Piece, Spec, Update
from diffalign.strategies.pair_kernel import Noised
from diffalign.strategies.registry import register
from diffalign.strategies.utility import PointRule, Utility, UtilityConfig, UtilityStrategy


@dataclass(frozen=True)
class DiffusionKTOConfig(UtilityConfig):
    """Constants of Diffusion-KTO.

    Args:
        utility: "sigmoid" (best in the paper), "loss_averse" or "risk_seeking" (the official code's "3").
        reference_point: "batch_mean" (official "none": the batch's own gains, clamped at 0), "class_means" (official
            "sigmoid": average of the means of liked and disliked, a class without examples counting 0) or "mismatched"
            (official "original": gains of the images under each other's captions, not clamped; two more evaluations
            without gradient). "batch_mean": official default.
    """

    utility: Utility = "sigmoid"
    reference_point: PointRule = "batch_mean"


_UNRELATED = "unrelated/"
"""How the fields begin that hold the condition of another image's caption."""


def unrelated(prompts: Sequence[str]) -> Tensor:
    """Return for each caption the place of the nearest one before it, in a circle, that differs from it, (n,) int64.

    Where all are the same it is n, the place of the empty caption behind them.
    """
    count, found = len(prompts), []
    for row, own in enumerate(prompts):
        before = ((row - step) % count for step in range(1, count))
        found.append(next((place for place in before if prompts[place] != own), count))
    return torch.tensor(found)


def with_unrelated_captions(batches: Sequence[ImageBatch], empty: Condition) -> list[ImageBatch]:
    """Return micro-batches that carry, in their fields, the conditions of captions that belong to other images.

    Args:
        batches: of one image an example; all of a process in an optimizer step.
        empty: the condition of the empty caption, one row.
    """
    conditions = Condition.cat([batch.condition for batch in batches])
    table = Condition.cat([conditions, empty.completed(conditions.select(slice(0, 1)))])
    rows = unrelated([prompt for batch in batches for prompt in batch.prompts])
    parts = rows.split([batch.size for batch in batches])
    return [
        replace(batch, fields={**batch.fields, **_named(table.select(part.to(batch.latents.device)))})
        for batch, part in zip(batches, parts, strict=True)
    ]


def unrelated_condition(batch: ImageBatch) -> Condition:
    """Return the condition that :func:`with_unrelated_captions` has given to a micro-batch."""
    named = {name: value for name, value in batch.fields.items() if name.startswith(_UNRELATED)}
    return Condition({name.removeprefix(_UNRELATED): value for name, value in named.items()})


def _named(condition: Condition) -> dict[str, Tensor]:
    return {f"{_UNRELATED}{name}": value for name, value in condition.tensors.items()}


@register(
    "diffusion_kto",
    summary="likes and dislikes of single images through a human utility, no pairs",
    paper="Aligning Diffusion Models by Optimizing Human Utility (arXiv 2404.04465)",
    repository="https://github.com/jacklishufan/diffusion-kto",
)
class DiffusionKTO(UtilityStrategy):
    """Learns from unpaired labels."""

    spec = Spec(data="unpaired", statistics="update")
    Config = DiffusionKTOConfig

    def __init__(self, config: DiffusionKTOConfig) -> None:
        super().__init__(config, config.utility, config.reference_point)

    def build(self, ctx: Context) -> None:
        """Refuse steps of one image to a process where images meet each other's captions."""
        if self.config.reference_point == "mismatched" and ctx.global_batch < 2 * ctx.world_size:
            raise UserError(
                "reference_point 'mismatched' shows images each other's captions, but optimizer steps of "
                f"{ctx.global_batch} on {ctx.world_size} process(es) leave each process one: raise --train_batch_size "
                "or --global_batch_pairs"
            )

    def collect(self, ctx: Context, batches: Sequence[ImageBatch]) -> list[Update]:  # type: ignore[override]
        """Give images each other's captions where the reference point wants them, whatever the micro-batches."""
        if self.config.reference_point == "mismatched" and batches:
            batches = with_unrelated_captions(batches, ctx.policy.null_condition(1))
        return [Update(batches)]

    def frozen(self, ctx: Context, batch: ImageBatch, draws: Noised, piece: Piece) -> Mapping[str, Tensor]:
        """Add the gains under other images' captions where the reference point wants them."""
        values = super().frozen(ctx, batch, draws, piece)
        if self.config.reference_point != "mismatched":
            return values
        return {**values, "mismatched_gain": self._mismatched_gain(ctx, batch, draws, piece)}

    def _mismatched_gain(self, ctx: Context, batch: ImageBatch, draws: Noised, piece: Piece) -> Tensor:
        """Gains (rows, 1) of the images under unrelated captions; never cached, as these change."""
        there = replace(draws, condition=unrelated_condition(batch))
        reference = super().frozen(ctx, replace(batch, cache_keys=None), there, piece)["reference"]
        with ctx.policy.inference():
            return reference - self._kernel.terms(ctx, batch, there, piece)
