"""Terms and batches from given token log-probabilities."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.batch import TextBatch
from diffalign.strategies.base import LossOutput, Strategy, Terms


def pair_batch(mask: Tensor) -> TextBatch:
    """Return a batch of pairs with a completion mask (2 B, length), chosen first."""
    ids = [f"pair-{index}" for index in range(len(mask) // 2)]
    return TextBatch(ids=ids, seeds=torch.arange(len(ids)), completion_mask=mask)


def stacked(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return values (B, length) of both completions as (2 B, length), chosen first, the shorter padded by zeros."""
    length = max(chosen.shape[1], rejected.shape[1])
    return torch.cat([F.pad(values, (0, length - values.shape[1])) for values in (chosen, rejected)])


def on_tokens(strategy: Strategy, policy: Tensor, mask: Tensor, reference: Tensor | None = None) -> LossOutput:
    """Run statistics and loss of a strategy as the loop does, one update of one micro-batch in one process."""
    frozen = {"mask": mask} if reference is None else {"mask": mask, "reference": reference}
    terms = Terms(policy, frozen)
    statistics = {}
    if strategy.spec.statistics != "none":
        with torch.no_grad():
            statistics = strategy.statistics(terms, lambda value: value)
    return strategy.loss(terms, statistics, pair_batch(mask))
