"""Rewards by name."""

from __future__ import annotations

from pathlib import Path

import torch

from diffalign.bundled import is_bundled
from diffalign.rewards.base import Reward
from diffalign.rewards.registry import LoadOptions, get_scorer


def load_reward(name: str, device: str | torch.device = "cpu", dtype: torch.dtype | None = None) -> Reward:
    """Load one reward; for several, with weights, see :func:`diffalign.rewards.compose.compose`.

    Args:
        name: a registered scorer ("pickscore", "verifier", ...), "NAME@SOURCE" for one with other weights, or a
            PickScore-like CLIP model by bundled name, local folder or hub name.
        device: where its network runs.
        dtype: how its network runs; by default in float32, and large vision-language models in bfloat16 on CUDA.

    Raises:
        UserError: if there is no such reward.
    """
    scorer, _, source = name.partition("@")
    if not source and (is_bundled(scorer) or "/" in scorer or Path(scorer).is_dir()):
        scorer, source = "pickscore", name
    found = get_scorer(scorer)
    return found.load(LoadOptions(source or None, device, dtype or found.usual_dtype(device)))
