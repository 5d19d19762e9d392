"""Parrot: policy gradient from those images only that no other image of the batch dominates in all rewards.

Paper: Lee et al., "Parrot: Pareto-optimal Multi-Reward Reinforcement Learning Framework for Text-to-Image Generation",
ECCV 2024, arXiv 2401.05675. No official code.
"""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.rewards.transforms import dominates


def pareto_mask(rewards: Tensor) -> Tensor:
    """Return which images no other one dominates, (n,) bool; never empty, equal images do not dominate each other.

    Args:
        rewards: (n, R) of images of ONE caption, finite.
    """
    return ~dominates(rewards).any(dim=0)


def selection_weights(rewards: Tensor, reward: int) -> Tensor:
    """Return the factor of each image's score function, (n,): ``r_k / n(P)`` on the front P, 0 elsewhere.

    Args:
        rewards: (n, R) of images of ONE caption, finite.
        reward: index k of the reward that the images were sampled for.
    """
    front = pareto_mask(rewards)
    return torch.where(front, rewards[:, reward], torch.zeros_like(rewards[:, reward])) / front.sum()


def centred_guidance(original: Tensor, expanded: Tensor, null: Tensor, w1: float = 5.0, w2: float = 5.0) -> Tensor:
    """Guide towards an expanded caption without leaving the original one; coefficients add up to 1.

    ``w1 e(original) + (1 - w1 - w2) e(null) + w2 e(expanded)``, for any parameterisation.

    Args:
        original, expanded, null: (rows, channels, ...) predictions under the three captions.
        w1, w2: weights of the original and the expanded caption. 5 and 5: paper. ``w2 = 0`` is ordinary guidance.
    """
    return w1 * original + (1 - w1 - w2) * null + w2 * expanded
