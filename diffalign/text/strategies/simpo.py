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
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from diffalign.batch import TextBatch
from diffalign.errors import UserError
from diffalign.strategies.base import Context, Kernel, LossOutput, Piece, Reduce, Spec, Strategy, Terms
from diffalign.strategies.heads import preference_loss
from diffalign.strategies.registry import register
from diffalign.text.kernel import TokenKernel
from diffalign.text.losses import HeadConstants, PairLogProbs, chosen_tokens_per_pair, head_losses, reward_metrics


@dataclass(frozen=True)
class SimPOConfig:
    """Constants of SimPO.

    Args:
        beta: scale of the rewards. 2.0: official code's default and its base models.
        gamma_beta_ratio: demanded margin of mean log-probabilities. 0.5: official Llama-3-8B base.
        head: "sigmoid" (paper) or "hinge" (official code).
        label_smoothing: probability that a label is wrong, for the sigmoid head. 0: paper.
        sft_weight: weight of the chosen completion's negative log-probability, averaged over all chosen tokens of the
            update. 0: paper.
    """

    beta: float = 2.0
    gamma_beta_ratio: float = 0.5
    head: Literal["sigmoid", "hinge"] = "sigmoid"
    label_smoothing: float = 0.0
    sft_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.beta <= 0:
            raise UserError(f"beta is {self.beta}: expected a positive number")
        if self.gamma_beta_ratio < 0 or self.sft_weight < 0:
            raise UserError("gamma_beta_ratio and sft_weight must not be negative")
        if not 0 <= self.label_smoothing < 0.5:
            raise UserError(f"label_smoothing is {self.label_smoothing}: expected a probability in [0, 0.5)")
        if self.label_smoothing and self.head != "sigmoid":
            raise UserError(f"label_smoothing belongs to the sigmoid head, not to {self.head!r}: set one or the other")


@register(
    "simpo",
    summary="text: pairs without a reference, by mean log-probabilities and a margin",
    paper="SimPO: Simple Preference Optimization with a Reference-Free Reward (arXiv 2405.14734)",
    repository="https://github.com/princeton-nlp/SimPO",
)
class SimPO(Strategy):
    """Learns from pairs of completions of one prompt."""

    spec = Spec(data="pairs", modality="text", needs_reference=False)
    Config = SimPOConfig

    def __init__(self, config: SimPOConfig) -> None:
        super().__init__(config)
        if config.sft_weight:
            self.spec = replace(self.spec, statistics="update")

    def kernel(self) -> Kernel:
        """Token log-probabilities of the policy alone."""
        return TokenKernel(reference=False)

    def frozen(self, ctx: Context, batch: TextBatch, draws: TextBatch, piece: Piece) -> Mapping[str, Tensor]:
        """Return the mask."""
        return self._kernel.frozen(ctx, batch, draws, piece)

    def statistics(self, terms: Terms, reduce: Reduce) -> Mapping[str, Tensor]:
        """Return the number of chosen tokens a pair over the whole update."""
        return chosen_tokens_per_pair(terms, reduce)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: TextBatch) -> LossOutput:
        """Return the mean over the pairs."""
        config = self.config
        pairs = PairLogProbs.of(terms, statistics.get("tokens_per_pair"))
        mean_w, mean_l = pairs.policy_w / pairs.length_w, pairs.policy_l / pairs.length_l
        margin = mean_w - mean_l - config.gamma_beta_ratio
        losses = preference_loss(margin, config.beta, config.head, config.label_smoothing)
        if config.sft_weight:
            losses = losses + config.sft_weight * head_losses("sft", pairs, HeadConstants(config.beta))
        metrics = reward_metrics(config.beta * mean_w, config.beta * mean_l)
        return LossOutput(losses.mean(), {"loss": losses.detach(), **metrics, **pairs.metrics()})
