"""Preference losses on sequence log-probabilities: pure functions, no model inside.

With lp the sum of a completion's token log-probabilities, ``lr = lp_policy - lp_reference``, ``|y|`` the number of its
tokens, and ls the log-sigmoid::

    m = lr_w - lr_l        a = beta lr_w        b = beta lr_l

    sigmoid       -ls(beta m)                     with label smoothing eps: (1 - eps) of it and eps of -ls(-beta m)
    robust        [-(1 - eps) ls(beta m) + eps ls(-beta m)] / (1 - 2 eps)
    hinge         relu(1 - beta m)
    ipo           (lr_w / |y_w| - lr_l / |y_l| - 1 / (2 beta))^2
    sigmoid_norm  sigmoid, with each lr divided by its length (LN-DPO)
    exo_pair      q_w (log q_w - log(1 - eps)) + q_l (log q_l - log eps),  q = sigmoid(+-beta m)
    nca_pair      -ls(a) - ls(-a) / 2 - ls(-b) / 2
    bco_pair      -ls(a) - ls(-b)
    sppo_hard     (lr_w - 1 / (2 beta))^2 + (lr_l + 1 / (2 beta))^2
    apo_zero      1 - sigmoid(a) + sigmoid(b)
    apo_down      sigmoid(a) + 1 - sigmoid(beta m)
    aot           sigmoid on sorted(policy lp_w - lp_l) - sorted(reference lp_w - lp_l)
    aot_unpaired  sigmoid on sorted(lr_w) - sorted(lr_l)
    discopop      (1 - g) (-ls(z)) + g exp(-z),  z = beta m, g = sigmoid(z / tau)
    sft           minus the chosen completions' log-probability per token, over all tokens together

Names are those of TRL's ``DPOConfig.loss_type``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.strategies.base import Reduce, Terms
from diffalign.strategies.heads import accuracy, preference_loss, scale_gradient

TextHead = Literal[
    "sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair", "sppo_hard", "apo_zero",
    "apo_down", "aot", "aot_unpaired", "discopop", "sft",
]  # fmt: skip
SMOOTHED: frozenset[TextHead] = frozenset({"sigmoid", "robust", "sigmoid_norm", "exo_pair", "aot", "aot_unpaired"})
"""Heads that know label smoothing."""
EXO_EPSILON = 1e-3
"""Label smoothing of ``exo_pair`` where none is given, which its logarithm needs (TRL)."""


@dataclass(frozen=True)
class PairLogProbs:
    """Sequence log-probabilities of B pairs and their lengths, each (B,); float32 or wider.

    Args:
        policy_w, policy_l: of the policy, summed over a completion's tokens.
        reference_w, reference_l: of the reference; zeros where a method has none.
        length_w, length_l: number of tokens, at least 1.
        tokens_per_pair: scalar: chosen tokens of the whole update divided by its pairs.
    """

    policy_w: Tensor
    policy_l: Tensor
    reference_w: Tensor
    reference_l: Tensor
    length_w: Tensor
    length_l: Tensor
    tokens_per_pair: Tensor

    @staticmethod
    def of(terms: Terms, tokens_per_pair: Tensor | None = None, rejected_gradient_scale: float = 1.0) -> PairLogProbs:
        """Sum per-token values (2 B, length) in block order, chosen first.

        Args:
            terms: with "mask", and "reference" where there is one.
            tokens_per_pair: of the whole update; by default that of these pairs.
            rejected_gradient_scale: factor on the gradient through rejected completions.
        """
        mask = terms.frozen["mask"].to(terms.policy.dtype)
        policy = (terms.policy * mask).sum(dim=1)
        reference = (terms.reference * mask).sum(dim=1) if "reference" in terms.frozen else torch.zeros_like(policy)
        lengths = mask.sum(dim=1)
        if tokens_per_pair is None:
            tokens_per_pair = lengths.chunk(2)[0].mean()
        (policy_w, policy_l), (reference_w, reference_l) = policy.chunk(2), reference.chunk(2)
        policy_l = scale_gradient(policy_l, rejected_gradient_scale)
        length_w, length_l = lengths.clamp(min=1).chunk(2)
        per_pair = tokens_per_pair.to(policy.dtype)
        return PairLogProbs(policy_w, policy_l, reference_w, reference_l, length_w, length_l, per_pair)

    @property
    def ratio_w(self) -> Tensor:
        """Log-ratio of policy to reference of the chosen completion."""
        return self.policy_w - self.reference_w

    @property
    def ratio_l(self) -> Tensor:
        """Log-ratio of policy to reference of the rejected completion."""
        return self.policy_l - self.reference_l

    @property
    def margin(self) -> Tensor:
        """Difference of the two log-ratios."""
        return self.ratio_w - self.ratio_l

    @property
    def margin_per_token(self) -> Tensor:
        """Difference of the two log-ratios, each divided by its own length."""
        return self.ratio_w / self.length_w - self.ratio_l / self.length_l

    def implicit_rewards(self, beta: float) -> dict[str, Tensor]:
        """Return the rewards ``beta lr`` as metrics; see :func:`reward_metrics`."""
        return reward_metrics(beta * self.ratio_w, beta * self.ratio_l)

    def metrics(self) -> dict[str, Tensor]:
        """Return log-probabilities and lengths to report, (B,) each, detached."""
        return {
            "logps/chosen": self.policy_w.detach(),
            "logps/rejected": self.policy_l.detach(),
            "length/chosen": self.length_w,
            "length/rejected": self.length_l,
        }


def reward_metrics(reward_w: Tensor, reward_l: Tensor) -> dict[str, Tensor]:
    """Return what every run reports of the rewards that a method implies, (B,) each, detached; a tie is no success."""
    reward_w, reward_l = reward_w.detach(), reward_l.detach()
    better = accuracy(reward_w - reward_l, tie=0.0)
    return {
        "rewards/chosen": reward_w,
        "rewards/rejected": reward_l,
        "rewards/margins": reward_w - reward_l,
        "rewards/accuracies": better,
        "implicit_accuracy": better,
    }


def chosen_tokens_per_pair(terms: Terms, reduce: Reduce) -> dict[str, Tensor]:
    """Return the statistic that ``sft`` divides by: chosen tokens over pairs, both summed over all processes."""
    chosen = terms.frozen["mask"].chunk(2)[0].double()
    return {"tokens_per_pair": reduce(chosen.sum()) / reduce(chosen.new_tensor(float(len(chosen))))}


@dataclass(frozen=True)
class HeadConstants:
    """Constants of the heads; which head uses which stands at the top of this module."""

    beta: float
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    ipo_length_norm: bool = True


def head_losses(head: TextHead, pairs: PairLogProbs, constants: HeadConstants) -> Tensor:
    """Return one loss a pair, (B,), whose mean is the head's loss.

    ``aot`` and ``aot_unpaired`` compare sorted values of the micro-batch, so a loss belongs to a rank, not to a pair.
    """
    return _HEADS[head](pairs, constants)


def _sigmoid(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    return preference_loss(pairs.margin, c.beta, "sigmoid", c.label_smoothing)


def _robust(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    logit, flipped = c.beta * pairs.margin, c.label_smoothing
    return (-(1 - flipped) * F.logsigmoid(logit) + flipped * F.logsigmoid(-logit)) / (1 - 2 * flipped)


def _hinge(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    return preference_loss(pairs.margin, c.beta, "hinge")


def _ipo(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    return preference_loss(pairs.margin_per_token if c.ipo_length_norm else pairs.margin, c.beta, "ipo")


def _sigmoid_norm(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    return preference_loss(pairs.margin_per_token, c.beta, "sigmoid", c.label_smoothing)


def _exo_pair(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    epsilon = c.label_smoothing or EXO_EPSILON
    log_w, log_l = F.logsigmoid(c.beta * pairs.margin), F.logsigmoid(-c.beta * pairs.margin)
    return log_w.exp() * (log_w - math.log1p(-epsilon)) + log_l.exp() * (log_l - math.log(epsilon))


def _nca_pair(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    a, b = c.beta * pairs.ratio_w, c.beta * pairs.ratio_l
    return -F.logsigmoid(a) - 0.5 * F.logsigmoid(-a) - 0.5 * F.logsigmoid(-b)


def _bco_pair(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    return -F.logsigmoid(c.beta * pairs.ratio_w) - F.logsigmoid(-c.beta * pairs.ratio_l)


def _sppo_hard(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    target = 1 / (2 * c.beta)
    return (pairs.ratio_w - target).square() + (pairs.ratio_l + target).square()


def _apo_zero(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    return 1 - torch.sigmoid(c.beta * pairs.ratio_w) + torch.sigmoid(c.beta * pairs.ratio_l)


def _apo_down(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    return torch.sigmoid(c.beta * pairs.ratio_w) + 1 - torch.sigmoid(c.beta * pairs.margin)


def _aot(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    policy, _ = (pairs.policy_w - pairs.policy_l).sort()
    reference, _ = (pairs.reference_w - pairs.reference_l).sort()
    return preference_loss(policy - reference, c.beta, "sigmoid", c.label_smoothing)


def _aot_unpaired(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    chosen, rejected = pairs.ratio_w.sort()[0], pairs.ratio_l.sort()[0]
    return preference_loss(chosen - rejected, c.beta, "sigmoid", c.label_smoothing)


def _discopop(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    logit = c.beta * pairs.margin
    gate = torch.sigmoid(logit / c.discopop_tau)
    return (1 - gate) * -F.logsigmoid(logit) + gate * torch.exp(-logit)


def supervision(pairs: PairLogProbs) -> Tensor:
    """Return plain fine-tuning's loss on the chosen completions, (B,), whose mean is that over all chosen tokens."""
    return -pairs.policy_w / pairs.tokens_per_pair


def _sft(pairs: PairLogProbs, c: HeadConstants) -> Tensor:
    return supervision(pairs)


_HEADS: Mapping[TextHead, Callable[[PairLogProbs, HeadConstants], Tensor]] = {
    "sigmoid": _sigmoid,
    "robust": _robust,
    "hinge": _hinge,
    "ipo": _ipo,
    "sigmoid_norm": _sigmoid_norm,
    "exo_pair": _exo_pair,
    "nca_pair": _nca_pair,
    "bco_pair": _bco_pair,
    "sppo_hard": _sppo_hard,
    "apo_zero": _apo_zero,
    "apo_down": _apo_down,
    "aot": _aot,
    "aot_unpaired": _aot_unpaired,
    "discopop": _discopop,
    "sft": _sft,
}
