"""Human utility of single judgements (Kahneman and Tversky): learning from likes and dislikes instead of pairs.

What an example *gains* over the reference (a difference of errors or of log-probabilities) is measured from a reference
point, signed by its label, and passed through a utility that flattens for large gains and losses. Shared by the image
and text methods of this family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.errors import UserError, require_above, unknown
from diffalign.strategies.base import Context, Kernel, LossOutput, Piece, Reduce, Strategy, Terms
from diffalign.strategies.beta import describe_beta
from diffalign.strategies.heads import accuracy
from diffalign.strategies.pair_kernel import DenoisingKernel, Noised, TimestepOptions

Utility = Literal["sigmoid", "loss_averse", "risk_seeking"]
PointRule = Literal["batch_mean", "class_means", "mismatched"]


def utility(z: Tensor, kind: Utility) -> Tensor:
    """Return the utility of a signed, scaled gain: ``sigmoid(z)``, ``log sigmoid(z)`` or ``-log sigmoid(-z)``."""
    if kind == "sigmoid":
        return torch.sigmoid(z)
    if kind == "loss_averse":
        return F.logsigmoid(z)
    if kind == "risk_seeking":
        return -F.logsigmoid(-z)
    raise unknown("utility", kind, get_args(Utility))


def batch_mean(gain: Tensor, reduce: Reduce) -> Tensor:
    """Return ``max(0, mean gain)`` over all processes, a scalar.

    Args:
        gain: (rows, K).
        reduce: sums over processes.
    """
    total, count = reduce(torch.stack([gain.sum(), torch.ones_like(gain).sum()]))
    return (total / count).clamp_min(0)


def class_means(gain: Tensor, label: Tensor, reduce: Reduce) -> Tensor:
    """Return the average of the two classes' mean gains over all processes, a scalar, not clamped.

    The mean of a class without examples is 0, as in Diffusion-KTO's official code: it halves the other's.

    Args:
        gain: (rows, K).
        label: (rows, K), 1 liked, 0 disliked.
        reduce: sums over processes.
    """
    classes = torch.stack([label, 1 - label]).to(gain.dtype)
    sums, counts = reduce(torch.stack([(classes * gain).sum((1, 2)), classes.sum((1, 2))]))
    return (sums / counts.clamp_min(1)).mean()


@dataclass(frozen=True)
class UtilityConfig(TimestepOptions):
    """Options of every objective on single judgements of images; methods add their own.

    Args:
        beta: inverse temperature on the difference of mean errors. 5000: Diffusion-KTO's best on SD 1.5 (its script's
            default is 1000).
        reference_scope: examples whose gains make the reference point: all of an optimizer step ("update"), or those of
            one micro-batch on all processes ("micro_batch", official).
        weight_liked: lambda of examples with label 1. 1: Diffusion-KTO's code.
        weight_disliked: lambda of examples with label 0. 1: Diffusion-KTO's code.
    """

    beta: float = 5000.0
    reference_scope: Literal["update", "micro_batch"] = "update"
    weight_liked: float = 1.0
    weight_disliked: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_above(0, self, "beta")

    @property
    def weights(self) -> tuple[float, float]:
        """Weights of the two labels, as :class:`UtilityObjective` takes them."""
        return self.weight_liked, self.weight_disliked


@dataclass(frozen=True)
class UtilityObjective:
    """The objective ``mean over rows of weight * (1 - U(w beta (gain - point)))``, w = +1 liked, -1 disliked.

    The terms are errors, one column, with the frozen values "reference" and "label", and, for the rule of that name,
    "mismatched_gain".

    Args:
        beta: inverse temperature on the gain.
        kind: the utility U.
        weights: of liked and of disliked examples.
        rule: what the reference point is.
    """

    beta: float
    kind: Utility = "sigmoid"
    weights: tuple[float, float] = (1.0, 1.0)
    rule: PointRule = "batch_mean"

    def point(self, terms: Terms, reduce: Reduce) -> Tensor:
        """Return the reference point, a scalar without gradient."""
        gain = (terms.reference - terms.policy).detach()
        if self.rule == "batch_mean":
            return batch_mean(gain, reduce)
        if self.rule == "class_means":
            return class_means(gain, terms.frozen["label"], reduce)
        if self.rule == "mismatched":
            unrelated = terms.frozen["mismatched_gain"]
            total, count = reduce(torch.stack([unrelated.sum(), torch.ones_like(unrelated).sum()]))
            return total / count
        raise unknown("reference point", self.rule, get_args(PointRule))

    def logits(self, terms: Terms, point: Tensor) -> Tensor:
        """Return ``z = w beta (reference - policy - point)``, (rows, 1): positive where a judgement is satisfied."""
        sign = 2 * terms.frozen["label"] - 1
        return sign * self.beta * (terms.reference - terms.policy - point)

    def __call__(self, terms: Terms, statistics: Mapping[str, Tensor]) -> LossOutput:
        """Return the mean loss over rows and the metrics, per row."""
        label, point = terms.frozen["label"], statistics["reference_point"]
        z = self.logits(terms, point)
        weight = torch.where(label > 0.5, self.weights[0], self.weights[1]).to(z)
        losses = weight * (1 - utility(z, self.kind))
        return LossOutput(losses.mean(), self._metrics(terms, z.detach(), losses.detach(), point))

    def _metrics(self, terms: Terms, z: Tensor, losses: Tensor, point: Tensor) -> dict[str, Tensor]:
        gain = (terms.reference - terms.policy).detach()
        liked = terms.frozen["label"]
        by_row = {
            "loss": losses,
            "logit": z,
            "implicit_accuracy": accuracy(z),
            "effective_weight": torch.sigmoid(z) * torch.sigmoid(-z),
            "gain": gain,
            "gain_for_label": (2 * liked - 1) * gain,
            "liked_share": liked,
            "policy_error": terms.policy.detach(),
            "reference_error": terms.reference,
        }
        return {name: value.mean(dim=1) for name, value in by_row.items()} | {"reference_point": point}


class UtilityStrategy(Strategy):
    """What Diffusion-KTO and TKTO have in common; each says what its labels are of.

    Args:
        config: constants.
        kind, rule: of the :class:`UtilityObjective`.
    """

    def __init__(self, config: UtilityConfig, kind: Utility = "sigmoid", rule: PointRule = "batch_mean") -> None:
        super().__init__(config)
        self.spec = replace(self.spec, statistics=config.reference_scope)
        self.objective = UtilityObjective(config.beta, kind, config.weights, rule)

    def kernel(self) -> Kernel:
        """Plain denoising errors."""
        return DenoisingKernel.drawing(self.config)

    def frozen(self, ctx: Context, batch: ImageBatch, draws: Noised, piece: Piece) -> Mapping[str, Tensor]:
        """Add the labels to the reference's errors."""
        values = super().frozen(ctx, batch, draws, piece)
        return {**values, "label": self.labels(batch, piece, like=values["reference"])}

    def labels(self, batch: ImageBatch, piece: Piece, like: Tensor) -> Tensor:
        """Return the labels of a piece's rows, (rows, 1), 1 good and 0 bad, typed and placed as ``like``.

        Raises:
            UserError: if the batch carries none.
        """
        if "label" not in batch.fields:
            have = ", ".join(sorted(batch.fields)) or "none"
            raise UserError(
                f"this method needs a 'label' for each example (1 good, 0 bad); the data has the fields: {have}"
            )
        label = batch.fields["label"].to(like)[:, None]
        return label if piece.rows is None else label[piece.rows]

    def statistics(self, terms: Terms, reduce: Reduce) -> Mapping[str, Tensor]:
        """The reference point."""
        return {"reference_point": self.objective.point(terms, reduce)}

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """See :class:`UtilityObjective`."""
        return self.objective(terms, statistics)

    def describe(self, ctx: Context) -> tuple[str, ...]:
        """What beta is in the paper's terms; there is no factor 0.5 here."""
        return describe_beta(ctx, self.objective.beta, factor=1.0)
