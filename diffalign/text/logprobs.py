"""Log-probabilities of given tokens without keeping a softmax over the vocabulary in float32."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_VALUES = 1 << 24
"""Logits whose softmax is formed at once: 64 MiB in float32."""


def token_log_probs(logits: Tensor, tokens: Tensor, chunk_values: int = CHUNK_VALUES) -> Tensor:
    """Log-softmax of ``logits`` at ``tokens``, in float32 or wider.

    Equal to ``logits.float().log_softmax(-1).gather(-1, tokens)``, but the softmax is formed in chunks, in the forward
    pass and again in backward; what stays in memory are the logits as the model gave them.

    Args:
        logits: (..., vocabulary), in the model's type.
        tokens: (...) int64.
        chunk_values: how many logits are worked on at once.

    Returns:
        (...) float32, or float64 for such logits; differentiable once.
    """
    flat = _Gathered.apply(logits.reshape(-1, logits.shape[-1]), tokens.reshape(-1), chunk_values)
    return flat.reshape(tokens.shape)  # type: ignore[no-any-return]


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, chunk_values: int) -> Tensor:
        ctx.rows = max(1, chunk_values // logits.shape[-1])
        wide = torch.promote_types(logits.dtype, torch.float32)
        values = [
            part.to(wide).log_softmax(dim=-1).gather(1, chosen[:, None])[:, 0]
            for part, chosen in zip(logits.split(ctx.rows), tokens.split(ctx.rows), strict=True)
        ]
        ctx.save_for_backward(logits, tokens)
        return torch.cat(values)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        logits, tokens = ctx.saved_tensors
        result = torch.empty_like(logits)
        parts = (value.split(ctx.rows) for value in (logits, tokens, gradient, result))
        for part, chosen, outer, target in zip(*parts, strict=True):
            slope = part.to(gradient.dtype).softmax(dim=-1).neg_()
            slope.scatter_add_(1, chosen[:, None], torch.ones_like(slope[:, :1]))
            target.copy_(slope.mul_(outer[:, None]))
        return result, None, None
