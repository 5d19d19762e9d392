"""From a batch of token sequences to per-token log-probabilities: what all objectives on text share.

Terms are (rows, length - 1): column ``t`` belongs to token ``t + 1``, and is 0 where that token is no part of a
completion. The mask of the completions comes with the frozen values, so that a loss needs nothing else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from diffalign.batch import TextBatch
from diffalign.strategies.base import Context, Piece


@dataclass(frozen=True)
class TokenKernel:
    """Evaluates policy and reference on the tokens of completions; nothing is drawn.

    Args:
        reference: also ask the reference; False for methods without one.
    """

    reference: bool = True

    def draw(self, ctx: Context, batch: TextBatch) -> TextBatch:
        """Return the batch: text has no noise."""
        return batch

    def rows(self, draws: TextBatch) -> int:
        """Number of sequences."""
        return len(draws.input_ids)

    def terms(self, ctx: Context, batch: TextBatch, draws: TextBatch, piece: Piece) -> Tensor:
        """Log-probabilities under the policy, (rows, length - 1), from one pass over chosen and rejected together."""
        return _log_probs(ctx.policy, draws, piece.rows)

    def frozen(self, ctx: Context, batch: TextBatch, draws: TextBatch, piece: Piece) -> Mapping[str, Tensor]:
        """Return the mask, and the log-probabilities under the reference, each (rows, length - 1)."""
        rows = piece.rows or slice(None)
        mask = draws.completion_mask[rows, 1:]
        if not self.reference:
            return {"mask": mask}
        assert ctx.reference is not None
        keys = None if batch.cache_keys is None else _row_keys(batch.cache_keys, draws.completions_per_prompt)[rows]
        values = ctx.reference.evaluate(lambda policy: _log_probs(policy, draws, piece.rows), keys)
        return {"mask": mask, "reference": _fit(values, mask.shape[1])}


def _log_probs(policy: object, draws: TextBatch, rows: slice | None) -> Tensor:
    part = rows or slice(None)
    return policy.token_log_probs(  # type: ignore[attr-defined, no-any-return]
        draws.input_ids[part], draws.attention_mask[part], draws.completion_mask[part]
    )


def _row_keys(keys: Sequence[str], completions: int) -> list[str]:
    return [f"{key}/{block}" for block in range(completions) for key in keys]


def _fit(values: Tensor, width: int) -> Tensor:
    """Bring cached values, padded as the batch they were computed in, to this batch's width; what is cut is zero."""
    return F.pad(values, (0, width - values.shape[1]))
