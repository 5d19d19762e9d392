"""D3PO: direct preference optimisation of every denoising step of two sampled trajectories.

Paper: Yang et al., "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model", CVPR 2024, arXiv
2311.13231. Official code: https://github.com/yk7333/d3po.

With ``L_i`` the step's log-density under the policy minus that under the reference, for trajectories 0 and 1::

    q_i  = clamp(L_i, log(1 - eps), log(1 + eps))
    loss = mean over pairs of -log sigmoid(beta (h_0 q_0 + h_1 q_1))

``h`` is +1 for the preferred trajectory, -1 for the other, 0 for both in a tie (loss log 2, no gradient). The clamp is
in the code only; the paper's image quality depends on it. Clamping the logarithm has the value and gradient of the
code's clamp of the ratio, without overflow.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.strategies.base import LossOutput
from diffalign.strategies.heads import accuracy


def preference_signs(rewards_0: Tensor, rewards_1: Tensor) -> Tensor:
    """Return who is preferred, (B, 2): (1, -1), (-1, 1), or (0, 0) for a tie.

    Args:
        rewards_0, rewards_1: (B,) or (B, R); of several rewards none may be lower and one must be higher.
    """
    first, second = (r.reshape(len(r), -1) for r in (rewards_0, rewards_1))
    better = (first >= second).all(1) & (first > second).any(1)
    worse = (second >= first).all(1) & (second > first).any(1)
    sign = better.to(rewards_0.dtype) - worse.to(rewards_0.dtype)
    return torch.stack([sign, -sign], dim=1)


def clipped_log_ratio(log_prob: Tensor, ref_log_prob: Tensor, eps: float = 0.1) -> Tensor:
    """Return ``log clamp(exp(log_prob - ref_log_prob), 1 - eps, 1 + eps)``, shaped as the inputs.

    Args:
        log_prob, ref_log_prob: of one shape.
        eps: half-width of the range, in (0, 1). 0.1: official code.
    """
    return (log_prob - ref_log_prob).clamp(math.log1p(-eps), math.log1p(eps))


def d3po_loss(ratio_0: Tensor, ratio_1: Tensor, signs: Tensor, beta: float = 0.1) -> LossOutput:
    """Return the mean over pairs (and steps) of the preference loss.

    Args:
        ratio_0, ratio_1: (B,) or (B, K) clipped log-ratios, with a graph.
        signs: (B, 2) of :func:`preference_signs`.
        beta: inverse temperature. 0.1: official code.
    """
    shape = (-1, *[1] * (ratio_0.dim() - 1))
    logit = beta * (signs[:, 0].reshape(shape) * ratio_0 + signs[:, 1].reshape(shape) * ratio_1)
    losses = -F.logsigmoid(logit).reshape(len(logit), -1).mean(1)
    seen = logit.detach().reshape(len(logit), -1).mean(1)
    return LossOutput(losses.mean(), {"loss": losses.detach(), "logit": seen, "implicit_accuracy": accuracy(seen)})
