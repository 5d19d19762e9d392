"""Pref-GRPO: the share of duels an image wins inside its group, as the reward of a group-relative policy gradient.

Paper: Wang et al., "Pref-GRPO: Pairwise Preference Reward-based GRPO for Stable Text-to-Image Reinforcement Learning",
arXiv 2508.20751. Official code: https://github.com/CodeGoat24/Pref-GRPO.

Duels by a pointwise score are :func:`diffalign.rewards.transforms.win_rates`; this is for a judge's verdicts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.errors import UserError


def duel_win_rates(pairs: Tensor, outcomes: Tensor, items: int, decimals: int | None = None) -> Tensor:
    """Return wins over duels of each image, (items,) float64; a tie is half a win for both.

    Args:
        pairs: (n, 2) int64, who met whom.
        outcomes: (n,) int64, 1 where the first won, 2 where the second did, 0 for a tie or no readable verdict.
        items: images in the group.
        decimals: round so far (3 in the released code); None does not round.

    Raises:
        UserError: if an image had no duel.
    """
    first = torch.where(outcomes == 0, 0.5, (outcomes == 1).double())
    points = torch.stack([first, 1 - first], dim=1).flatten()
    wins = torch.zeros(items, dtype=torch.float64).index_add_(0, pairs.flatten(), points)
    duels = torch.bincount(pairs.flatten(), minlength=items)
    if bool((duels == 0).any()):
        raise UserError(f"images {(duels == 0).nonzero().flatten().tolist()} of a group had no duel: judge every image")
    rates = wins / duels
    return rates if decimals is None else rates.round(decimals=decimals)
