"""IPO for language models: the margin of log-ratios is regressed on a target instead of being pushed without end.

Paper: Azar et al., "A General Theoretical Paradigm to Understand Learning from Human Preferences", AISTATS 2024,
arXiv 2310.12036. No official code; the length-normalised form is TRL's, confirmed there by the authors.

With ``lr = lp_policy - lp_reference`` summed over a completion of ``|y|`` tokens::

    h    = lr_w / |y_w| - lr_l / |y_l|         (or lr_w - lr_l, as in the DPO authors' code)
    loss = mean over pairs of (h - 1 / (2 beta))^2

The paper calls beta tau. At the start the loss is ``1 / (4 beta^2)``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffalign.batch import TextBatch
from diffalign.errors import require_above
from diffalign.strategies.base import LossOutput, Terms
from diffalign.strategies.heads import PairOptions
from diffalign.strategies.registry import register
from diffalign.text.losses import HeadConstants, head_losses
from diffalign.text.pair_strategy import TextPairStrategy


@dataclass(frozen=True)
class IPOConfig(PairOptions):
    """Constants of IPO.

    Args:
        beta: strength of the regularisation, the paper's tau; the target is ``1 / (2 beta)``. 0.1: TRL.
        length_norm: divide each log-ratio by its completion's length. True: TRL, confirmed by the authors.
    """

    beta: float = 0.1
    length_norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_above(0, self, "beta")


@register(
    "ipo",
    summary="text: pairs against a frozen reference, with a target for the margin",
    paper="A General Theoretical Paradigm to Understand Learning from Human Preferences (arXiv 2310.12036)",
)
class IPO(TextPairStrategy):
    """Learns from pairs of completions of one prompt."""

    Config = IPOConfig

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: TextBatch) -> LossOutput:
        """Return the mean squared distance of the margins from their target."""
        pairs = self.pairs(terms, statistics)
        constants = HeadConstants(self.config.beta, ipo_length_norm=self.config.length_norm)
        return self.output(head_losses("ipo", pairs, constants), pairs, pairs.implicit_rewards(self.config.beta))
