"""Rewards by name."""

from __future__ import annotations

import torch

from diffalign.rewards.base import Reward


def load_reward(name: str, device: str | torch.device = "cpu") -> Reward:
    """Load a reward.

    Args:
        name: "verifier" or "graded" (the exact verifier of the bundled world), else a PickScore-like CLIP model by
            bundled name, local folder or hub name.
        device: where its network runs.

    Raises:
        UserError: if there is no such reward.
    """
    if name in ("verifier", "graded"):
        from diffalign.rewards.verifier import Verifier

        return Verifier(graded=name == "graded")
    from diffalign.rewards.pickscore import PickScore

    return PickScore.load(name, device=device)
