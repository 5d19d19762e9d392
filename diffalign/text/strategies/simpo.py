"""SimPO: pairs of completions without a reference; rewards are mean log-probabilities, and a margin is demanded.

Paper: Meng, Xia and Chen, "SimPO: Simple Preference Optimization with a Reference-Free Reward", NeurIPS 2024,
arXiv 2405.14734. Official code: https://github.com/princeton-nlp/SimPO.

With ``a = lp / |y|``, the mean log-probability of a completion's tokens under the policy::

    loss = mean over pairs of -log sigmoid(beta (a_w - a_l - gamma_beta_ratio))

At equal mean log-probabilities the loss is softplus(gamma), ``gamma = beta gamma_beta_ratio``, not log 2. TRL takes
gamma itself (``simpo_gamma``). The learning rate matters most: too high a rate shows as endless repetitions while the
margin grows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffalign.batch import TextBatch
from diffalign.errors import require_above, require_at_least
from diffalign.strategies.base import LossOutput, Spec, Terms
from diffalign.strategies.heads import PairOptions, check_label_smoothing, preference_loss
from diffalign.strategies.registry import register
from diffalign.text.losses import reward_metrics
from diffalign.text.pair_strategy import TextPairStrategy


@dataclass(frozen=True)
class SimPOConfig(PairOptions):
    """Constants of SimPO.

    Args:
        beta: scale of the rewards. 2.0: official code's default and its base models.
        gamma_beta_ratio: demanded margin of mean log-probabilities. 0.5: official Llama-3-8B base.
        head: "sigmoid" (paper) or "hinge" (official code).
        label_smoothing: probability that a label is wrong, for the sigmoid head. 0: paper.
    """

    beta: float = 2.0
    gamma_beta_ratio: float = 0.5
    head: Literal["sigmoid", "hinge"] = "sigmoid"
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_above(0, self, "beta")
        require_at_least(0, self, "gamma_beta_ratio")
        check_label_smoothing(self.label_smoothing, self.head)


@register(
    "simpo",
    summary="text: pairs without a reference, by mean log-probabilities and a margin",
    paper="SimPO: Simple Preference Optimization with a Reference-Free Reward (arXiv 2405.14734)",
    repository="https://github.com/princeton-nlp/SimPO",
)
class SimPO(TextPairStrategy):
    """Learns from pairs of completions of one prompt."""

    spec = Spec(data="pairs", modality="text", needs_reference=False)
    Config = SimPOConfig

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: TextBatch) -> LossOutput:
        """Return the mean over the pairs."""
        config = self.config
        pairs = self.pairs(terms, statistics)
        mean_w, mean_l = pairs.policy_w / pairs.length_w, pairs.policy_l / pairs.length_l
        margin = mean_w - mean_l - config.gamma_beta_ratio
        losses = preference_loss(margin, config.beta, config.head, config.label_smoothing)
        return self.output(losses, pairs, reward_metrics(config.beta * mean_w, config.beta * mean_l))
