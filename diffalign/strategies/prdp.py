"""PRDP: predict the difference of two images' rewards by the difference of their trajectories' log-ratios.

Paper: Deng et al., "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models",
CVPR 2024, arXiv 2402.08714; the loss follows its appendix G. No official repository.

For trajectories of ONE caption, with means over the T steps::

    rhat      = mean_t (log pi - log pi_ref)
    rhat_clip = mean_t clamp(log pi - log pi_ref, old +- eps)        old: the same at the start of the epoch
    l(a, b)   = max((drhat - dr / beta)^2, (drhat_clip - dr / beta)^2)
    loss      = mean of l over pairs with dr > 0

The loss is huge by construction (``dr / beta`` is of the order 1e2 to 1e4); the gradient norm must be clipped.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from diffalign.errors import UserError


class PairLosses(NamedTuple):
    """Losses of all ordered pairs of a group.

    Args:
        losses: (B, B), symmetric, zero on the diagonal.
        counted: (B, B) bool, True where the first image has the higher reward.
    """

    losses: Tensor
    counted: Tensor

    @property
    def loss(self) -> Tensor:
        """Mean over the counted pairs; 0, without a gradient, for a group of equal rewards."""
        kept = torch.where(self.counted, self.losses, torch.zeros_like(self.losses))
        return kept.sum() / self.counted.sum().clamp(min=1)


def reward_difference_losses(
    log_prob: Tensor, old_log_prob: Tensor, ref_log_prob: Tensor, rewards: Tensor, beta: float, eps: float
) -> PairLosses:
    """Return the proximal losses of all pairs of one caption's images.

    Args:
        log_prob: (B, T) of the policy, with a graph.
        old_log_prob, ref_log_prob: (B, T) of the policy at the start of the epoch, and of the reference.
        rewards: (B,).
        beta: weight of the divergence from the reference; 3e-5 or 3e-6 in the paper.
        eps: half-width of the trust region of each step's log-density; 1e-6 or 1e-4 in the paper.

    Raises:
        UserError: if beta or eps is not above 0.
    """
    if beta <= 0 or eps <= 0:
        raise UserError(f"PRDP with beta {beta} and eps {eps}: expected numbers above 0")
    step, old = log_prob - ref_log_prob, old_log_prob - ref_log_prob
    wanted = _differences(rewards.to(log_prob) / beta)
    plain = _differences(step.mean(1)) - wanted
    proximal = _differences(torch.clamp(step, old - eps, old + eps).mean(1)) - wanted
    return PairLosses(torch.maximum(plain.square(), proximal.square()), _differences(rewards) > 0)


def _differences(values: Tensor) -> Tensor:
    return values[:, None] - values[None, :]
