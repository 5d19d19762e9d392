"""From errors of pairs to a preference loss: margins, logit, head, and what every run reports of them.

With err the mean squared error of an image, lower = better, and the reference's errors beside the policy's::

    d_w  = ref_err_w - err_w        d_l = ref_err_l - err_l        better than the reference where positive
    z    = 0.5 * beta * weight * (d_w - d_l)                       positive where the pair is ranked correctly
    loss = mean over pairs of  head(z) + sft_weight * err_w

The factor 0.5 and the mean over elements are those of Diffusion-DPO's code. In the paper's terms, a sum over the n
elements of an image, the same logit has ``beta_sum = 0.5 * beta / n`` (:mod:`diffalign.strategies.beta`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from diffalign.errors import require_above, require_at_least
from diffalign.strategies.base import Context, LossOutput, Strategy, Terms
from diffalign.strategies.beta import describe_beta
from diffalign.strategies.heads import Head, PairOptions, accuracy, preference_loss, scale_gradient
from diffalign.strategies.pair_kernel import TimestepOptions


class PairErrors(NamedTuple):
    """Mean squared errors of B pairs, each (B,)."""

    err_w: Tensor
    err_l: Tensor
    ref_err_w: Tensor
    ref_err_l: Tensor

    @staticmethod
    def of(terms: Terms) -> PairErrors:
        """Split terms (2 B, K) in block order, averaging over K."""
        return PairErrors(*terms.policy.mean(dim=1).chunk(2), *terms.reference.mean(dim=1).chunk(2))

    @property
    def d_w(self) -> Tensor:
        """By how much the policy denoises the chosen image better than the reference does."""
        return self.ref_err_w - self.err_w

    @property
    def d_l(self) -> Tensor:
        """By how much the policy denoises the rejected image better than the reference does."""
        return self.ref_err_l - self.err_l

    def swapped(self, where: Tensor) -> PairErrors:
        """Exchange chosen and rejected in the pairs (B,) bool that ``where`` marks."""
        other = (self.err_l, self.err_w, self.ref_err_l, self.ref_err_w)
        return PairErrors(*(torch.where(where, there, here) for here, there in zip(self, other, strict=True)))

    def metrics(self) -> dict[str, Tensor]:
        """Return margins and errors to report, (B,) each, detached."""
        values = {
            "winner_margin": self.d_w,
            "loser_margin": -self.d_l,
            "policy_error_chosen": self.err_w,
            "policy_error_rejected": self.err_l,
            "reference_error_chosen": self.ref_err_w,
            "reference_error_rejected": self.ref_err_l,
        }
        return {name: value.detach() for name, value in values.items()}


@dataclass(frozen=True)
class PairConfig(TimestepOptions, PairOptions):
    """Options of every objective on denoising errors of pairs; methods add their own constants.

    Args:
        rejected_gradient_ratio: bound on the gradient at the rejected image's prediction, as a multiple of that at the
            chosen one's: where it is longer it is shortened. 0: no bound, as in the papers.
        beta: inverse temperature on differences of mean errors. 2000: Diffusion-DPO's main SD 1.5 result.
    """

    rejected_gradient_ratio: float = 0.0
    beta: float = 2000.0

    def __post_init__(self) -> None:
        TimestepOptions.__post_init__(self)
        PairOptions.__post_init__(self)
        require_above(0, self, "beta")
        require_at_least(0, self, "rejected_gradient_ratio")

    def rejected_scale(self, err_w: Tensor, err_l: Tensor) -> float | Tensor:
        """Return the factor on the gradient through the rejected images, without a gradient of its own.

        The gradient of a squared error at the prediction is as long as the square root of the error. So the factor is
        ``rejected_gradient_scale * min(1, rejected_gradient_ratio * sqrt(err_w / err_l))``.

        Args:
            err_w, err_l: errors of chosen and rejected images, of shapes that broadcast.
        """
        if not self.rejected_gradient_ratio:
            return self.rejected_gradient_scale
        relative = (err_w.detach() / err_l.detach().clamp_min(torch.finfo(err_l.dtype).tiny)).sqrt()
        return self.rejected_gradient_scale * (self.rejected_gradient_ratio * relative).clamp(max=1)


@dataclass(frozen=True)
class PairObjective:
    """A head on the scaled margin between the two images of a pair.

    Args:
        options: beta, with the factor 0.5 and errors averaged over elements; weight of supervision; scale and bound of
            the rejected gradient.
        head: which loss of the logit.
        label_smoothing: probability that a label is wrong; for the sigmoid head only.
    """

    options: PairConfig = PairConfig()
    head: Head = "sigmoid"
    label_smoothing: float = 0.0

    def __call__(self, errors: PairErrors, weight: Tensor | float = 1.0) -> LossOutput:
        """Return the loss, a mean over pairs, and the metrics.

        Args:
            errors: of the pairs of a micro-batch.
            weight: factor on each pair's margin, inside the head; (B,) or one for all.
        """
        d_l = scale_gradient(errors.d_l, self.options.rejected_scale(errors.err_w, errors.err_l))
        output = self.from_margin(weight * (errors.d_w - d_l), errors.err_w)
        return LossOutput(output.loss, {**output.metrics, **errors.metrics()})

    def from_margin(self, margin: Tensor, err_w: Tensor | None = None) -> LossOutput:
        """Return the loss of margins that a method forms by a rule of its own, and the metrics of the logit.

        Args:
            margin: (B,), not yet scaled by ``0.5 * beta``.
            err_w: (B,) errors of the chosen images; needed for ``sft_weight`` only.
        """
        scale = 0.5 * self.options.beta
        losses = preference_loss(margin, scale, self.head, self.label_smoothing)
        if self.options.sft_weight:
            assert err_w is not None
            losses = losses + self.options.sft_weight * err_w
        logit = scale * margin.detach()
        metrics = {
            "loss": losses.detach(),
            "logit": logit,
            "implicit_accuracy": accuracy(logit),
            "effective_weight": torch.sigmoid(-logit),
        }
        return LossOutput(losses.mean(), metrics)


class PairStrategy(Strategy):
    """A method whose loss is a :class:`PairObjective`; the run's header says what its beta is in the paper's terms."""

    objective: PairObjective

    def describe(self, ctx: Context) -> tuple[str, ...]:
        return describe_beta(ctx, self.config.beta)
