"""Rewards by name."""

from __future__ import annotations

from pathlib import Path

import torch

from diffalign.bundled import is_bundled
from diffalign.rewards.base import Reward
from diffalign.rewards.registry import LoadOptions, get_scorer


def load_reward(name: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> Reward:
    """Load one reward; for several, with weights, see :func:`diffalign.rewards.compose.compose`.

    Args:
        name: a registered scorer ("pickscore", "verifier", ...), "NAME@SOURCE" for one with other weights, or a
            PickScore-like CLIP model by bundled name, local folder or hub name.
        device: where its network runs.
        dtype: how its network runs.

    Raises:
        UserError: if there is no such reward.
    """
    scorer, _, source = name.partition("@")
    if not source and (is_bundled(scorer) or "/" in scorer or Path(scorer).is_dir()):
        scorer, source = "pickscore", name
    return get_scorer(scorer).load(LoadOptions(source or None, device, dtype))
