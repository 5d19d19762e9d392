"""DPO for language models, with the whole family of pairwise losses and weighted mixtures of them.

Paper: Rafailov et al., "Direct Preference Optimization: Your Language Model is Secretly a Reward Model", NeurIPS 2023,
arXiv 2305.18290. Official code: https://github.com/eric-mitchell/direct-preference-optimization. Losses by the names of
TRL's ``DPOTrainer`` (1.16), whose numbers they give; formulas in :mod:`diffalign.text.losses`.

With lp the summed log-probability of a completion and ``lr = lp_policy - lp_reference``::

    loss = mean over pairs of -log sigmoid(beta (lr_w - lr_l))

The loss starts at log 2. Log-probabilities are summed, never averaged. That the chosen completion's log-probability
falls while the margin grows is common.

Departures: TRL's ``sigmoid`` ignores label smoothing; here it is conservative DPO, as in the official code. ``sft``
counts tokens over the whole update, not over one micro-batch. ``aot`` sorts within a micro-batch, as TRL does within a
device's batch: with a micro-batch of one pair it is ``sigmoid``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from torch import Tensor

from diffalign.batch import TextBatch
from diffalign.errors import UserError, require_above, unknown
from diffalign.strategies.base import LossOutput, Terms
from diffalign.strategies.heads import PairOptions, check_label_smoothing
from diffalign.strategies.registry import register
from diffalign.text.losses import SMOOTHED, HeadConstants, TextHead, head_losses
from diffalign.text.pair_strategy import TextPairStrategy


@dataclass(frozen=True)
class DPOConfig(PairOptions):
    """Constants of DPO.

    Args:
        beta: inverse temperature on summed log-ratios. 0.1: paper, TRL.
        loss_type: losses of a pair; several are added. "sigmoid": paper.
        loss_weights: one weight a loss; empty for 1 each (TRL).
        label_smoothing: probability that a label is wrong. 0: paper.
        discopop_tau: temperature of discopop's gate. 0.05: its paper, TRL.
        ipo_length_norm: divide each log-ratio by its length in the ipo loss. True: TRL, confirmed by IPO's authors.
    """

    beta: float = 0.1
    loss_type: list[TextHead] = field(default_factory=lambda: ["sigmoid"])
    loss_weights: list[float] = field(default_factory=list)
    label_smoothing: float = 0.0
    discopop_tau: float = 0.05
    ipo_length_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        for head in self.loss_type:
            if head not in get_args(TextHead):
                raise unknown("loss_type", head, get_args(TextHead))
        if not self.loss_type or len(self.loss_weights) not in (0, len(self.loss_type)):
            raise UserError(
                f"loss_type {self.loss_type} with loss_weights {self.loss_weights}: expected one loss or more, and "
                "one weight each or none"
            )
        require_above(0, self, "beta", "discopop_tau")
        check_label_smoothing(self.label_smoothing)
        if self.label_smoothing == 0.5 and "robust" in self.loss_type:
            raise UserError("label_smoothing is 0.5, and robust divides by 1 - 2 label_smoothing: give less")
        if self.label_smoothing and not SMOOTHED.intersection(self.loss_type):
            raise UserError(
                f"label_smoothing does nothing in {self.loss_type}: it belongs to {', '.join(sorted(SMOOTHED))}"
            )

    @property
    def weights(self) -> list[float]:
        """The weights with the shorthand of an empty list resolved."""
        return self.loss_weights or [1.0] * len(self.loss_type)


@register(
    "dpo",
    summary="text: pairs against a frozen reference; fifteen losses and their mixtures",
    paper="Direct Preference Optimization: Your Language Model is Secretly a Reward Model (arXiv 2305.18290)",
    repository="https://github.com/eric-mitchell/direct-preference-optimization",
)
class DPO(TextPairStrategy):
    """Learns from pairs of completions of one prompt."""

    Config = DPOConfig

    def __init__(self, config: DPOConfig) -> None:
        super().__init__(config)
        self._constants = HeadConstants(
            config.beta, config.label_smoothing, config.discopop_tau, config.ipo_length_norm
        )

    @property
    def counts_tokens(self) -> bool:
        """With ``sft`` among the losses, too."""
        return super().counts_tokens or "sft" in self.config.loss_type

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: TextBatch) -> LossOutput:
        """Return the weighted sum of the losses, a mean over the pairs."""
        pairs = self.pairs(terms, statistics)
        weighted = zip(self.config.weights, self.config.loss_type, strict=True)
        losses = sum(weight * head_losses(head, pairs, self._constants) for weight, head in weighted)
        assert isinstance(losses, Tensor)
        return self.output(losses, pairs, pairs.implicit_rewards(self.config.beta))
