"""The clipped policy gradient that on-policy methods share.

With ``r`` the ratio of new to old density of a step and ``A`` the advantage of its trajectory::

    loss = mean over examples of the mean over their counted steps of  weight * max(-A r, -A clamp(r, 1 - c, 1 + c))

Densities are means over latent elements (``diffusion.sde``), which is why published clipping ranges are near 1e-4.
DDPO: arXiv 2305.13301; Flow-GRPO: arXiv 2505.05470.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import require_above
from diffalign.strategies.base import LossOutput


@dataclass(frozen=True)
class ClippedObjective:
    """PPO's pessimistic surrogate on log-ratios.

    Args:
        clip_range: c, half-width of the trust region of the ratio. 1e-4: official code of DDPO and Flow-GRPO.
        advantage_limit: advantages are clamped to its plus and minus. 5: official code of both.
    """

    clip_range: float = 1e-4
    advantage_limit: float = 5.0

    def __post_init__(self) -> None:
        require_above(0, self, "clip_range", "advantage_limit")

    def losses(self, log_ratio: Tensor, advantages: Tensor) -> Tensor:
        """Return the loss of every step, shaped as ``log_ratio``.

        Args:
            log_ratio: (rows,) or (rows, K) new minus old log-probability, with a graph.
            advantages: (rows,).
        """
        limited = advantages.clamp(-self.advantage_limit, self.advantage_limit).to(log_ratio)
        limited = limited.reshape(-1, *[1] * (log_ratio.dim() - 1))
        ratio = log_ratio.exp()
        clipped = ratio.clamp(1 - self.clip_range, 1 + self.clip_range)
        return torch.maximum(-limited * ratio, -limited * clipped)

    def __call__(
        self, log_ratio: Tensor, advantages: Tensor, weight: Tensor | None = None, mask: Tensor | None = None
    ) -> LossOutput:
        """Return the loss and what to watch: ratio, approximate divergence, share of clipped steps.

        Args:
            log_ratio: (rows, K) with a graph.
            advantages: (rows,).
            weight: factor on each step's loss, broadcastable to (rows, K).
            mask: (rows, K) 1 where a step counts; a row without any contributes 0.
        """
        losses = self.losses(log_ratio, advantages)
        steps = losses if weight is None else losses * weight
        rows = mean_of_counted(steps, mask)
        return LossOutput(rows.mean(), {"loss": rows.detach(), **self.metrics(log_ratio.detach(), mask)})

    def metrics(self, log_ratio: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return (rows,) figures of log-ratios (rows, K) without a graph."""
        ratio = log_ratio.exp()
        values = {
            "ratio": ratio,
            "approximate_kl": 0.5 * log_ratio.square(),
            "clipped_share": ((ratio - 1).abs() > self.clip_range).to(ratio.dtype),
        }
        return {name: mean_of_counted(value, mask) for name, value in values.items()}


def mean_of_counted(values: Tensor, mask: Tensor | None) -> Tensor:
    """Average (rows, K) over the counted entries of each row, (rows,); 0 for a row without any.

    Entries that do not count may hold anything, NaN included.
    """
    if mask is None:
        return values.mean(dim=1)
    counted = mask.to(values.dtype)
    kept = torch.where(mask > 0, values, torch.zeros_like(values))
    return (kept * counted).sum(1) / counted.sum(1).clamp(min=1)
