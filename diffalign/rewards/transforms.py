"""The arithmetic of combining scores; pure functions on tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def log_sigmoid_centred(rewards: Tensor, reference: Tensor | float) -> Tensor:
    """Log-probability of being better than a reference (Wang et al., arXiv 2402.00742): ``log sigmoid(r - ref)``.

    Far below the reference it is about ``r - ref``; far above it saturates at 0, so that answers good enough already
    are not pushed further. Only meaningful for rewards on a preference-logit scale.

    Args:
        rewards: (..., n).
        reference: broadcast against it.
    """
    return F.logsigmoid(rewards - reference)


def damped_penalty(penalty: Tensor, disagreement: Tensor, exponent_scale: float = 1.0, weight: float = 1.0) -> Tensor:
    """Heteroscedastic form of a penalty (Ctrl-U, arXiv 2410.11236): ``penalty * exp(-a U) + w U``.

    Where two looks at one image disagree the penalty counts less; the second term keeps the model from seeking
    disagreement.

    Args:
        penalty: non-negative, lower is better.
        disagreement: U, non-negative, of the same shape.
        exponent_scale, weight: a and w.
    """
    return penalty * torch.exp(-exponent_scale * disagreement) + weight * disagreement


def duel_win_rates(pairs: Tensor, points: Tensor, members: int) -> Tensor:
    """Share of its duels each member of a group wins (Pref-GRPO, arXiv 2508.20751).

    A tie is half a win for both, and so is a verdict that nobody can read, as in the official code.

    Args:
        pairs: (n, 2) int64, who met whom.
        points: (n,) of the first: 1 it won, 0 the other did, 1/2 a tie; NaN where nobody can tell.
        members: of the group.

    Returns:
        (members,) in [0, 1]; 1/2 for a member without a duel.
    """
    points = points.nan_to_num(nan=0.5)
    both = torch.stack([points, 1 - points], dim=1).flatten()
    wins = points.new_zeros(members).index_add_(0, pairs.flatten(), both)
    duels = torch.bincount(pairs.flatten(), minlength=members).to(points)
    return torch.where(duels > 0, wins / duels.clamp(min=1), 0.5)


def win_rates(scores: Tensor, margin: float = 0.0) -> Tensor:
    """Share of duels each member of a group wins where every two meet and scores decide.

    Args:
        scores: (group,).
        margin: scores no further apart than this are a tie.

    Returns:
        (group,) in [0, 1], mean 1/2; 1/2 for a group of one.
    """
    pairs = torch.combinations(torch.arange(len(scores), device=scores.device))
    gap = scores[pairs[:, 0]] - scores[pairs[:, 1]]
    points = (gap > margin).to(scores) + 0.5 * (gap.abs() <= margin).to(scores)
    return duel_win_rates(pairs, points, len(scores))


def dominates(scores: Tensor) -> Tensor:
    """Say who dominates whom: no worse in every reward and better in one.

    Args:
        scores: (n, rewards), higher is better.

    Returns:
        (n, n) bool; entry (i, j) is true if i dominates j.
    """
    left, right = scores[:, None], scores[None, :]
    return (left >= right).all(-1) & (left > right).any(-1)


def pareto_ranks(scores: Tensor) -> Tensor:
    """Rank by non-dominated sorting: 0 for the Pareto front (Parrot, arXiv 2401.05675), 1 for the front without it, ...

    Args:
        scores: (n, rewards), higher is better; no NaN.

    Returns:
        (n,) int64.
    """
    beats = dominates(scores)
    ranks = torch.full((len(scores),), -1, dtype=torch.long, device=scores.device)
    rank = 0
    while (left := ranks < 0).any():
        front = left & ~(beats & left[:, None]).any(0)
        ranks[front] = rank
        rank += 1
    return ranks


def rows_by_caption(prompts: Sequence[str]) -> list[list[int]]:
    """Rows of each caption, in order of first appearance."""
    rows: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(prompt, []).append(index)
    return list(rows.values())
