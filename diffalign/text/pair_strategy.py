"""What text methods on pairs share: log-probabilities of both completions, supervision, scaled rejected gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from diffalign.batch import TextBatch
from diffalign.strategies.base import Context, Kernel, LossOutput, Piece, Reduce, Spec, Strategy, Terms
from diffalign.strategies.heads import PairOptions
from diffalign.text.kernel import TokenKernel
from diffalign.text.losses import PairLogProbs, chosen_tokens_per_pair, supervision


class TextPairStrategy(Strategy):
    """A method on pairs of completions of one prompt; each has its own loss of a pair.

    Args:
        config: constants of the method beside the options of every objective on pairs.
    """

    spec = Spec(data="pairs", modality="text")

    def __init__(self, config: PairOptions) -> None:
        super().__init__(config)
        if self.counts_tokens:
            self.spec = replace(self.spec, statistics="update")

    @property
    def counts_tokens(self) -> bool:
        """Whether the loss averages over the chosen tokens of the whole update, as supervision does."""
        return bool(self.config.sft_weight)

    def kernel(self) -> Kernel:
        """Token log-probabilities of the policy, and of the reference where there is one."""
        return TokenKernel(reference=self.spec.needs_reference)

    def frozen(self, ctx: Context, batch: TextBatch, draws: TextBatch, piece: Piece) -> Mapping[str, Tensor]:
        """Return the mask, and the reference's values where there is one."""
        return self._kernel.frozen(ctx, batch, draws, piece)

    def statistics(self, terms: Terms, reduce: Reduce) -> Mapping[str, Tensor]:
        """Return the number of chosen tokens a pair over the whole update."""
        return chosen_tokens_per_pair(terms, reduce)

    def pairs(self, terms: Terms, statistics: Mapping[str, Tensor]) -> PairLogProbs:
        """Return the log-probabilities of the pairs, with the gradient of the rejected completions scaled."""
        return PairLogProbs.of(terms, statistics.get("tokens_per_pair"), self.config.rejected_gradient_scale)

    def output(self, losses: Tensor, pairs: PairLogProbs, rewards: Mapping[str, Tensor]) -> LossOutput:
        """Add supervision, and return the mean over the pairs with what every run reports.

        Args:
            losses: (B,) of the method.
            pairs: what they are of.
            rewards: metrics of the rewards that the method implies.
        """
        if self.config.sft_weight:
            losses = losses + self.config.sft_weight * supervision(pairs)
        return LossOutput(losses.mean(), {"loss": losses.detach(), **rewards, **pairs.metrics()})
