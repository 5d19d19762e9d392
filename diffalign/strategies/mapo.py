"""MaPO, margin-aware preference optimisation: pairs without a reference.

Paper: Hong et al., "Margin-aware Preference Optimization for Aligning Diffusion Models without Reference",
arXiv 2406.06424. Official code: https://github.com/mapo-t2i/mapo.

The images of a pair share timestep and noise. With err the policy's mean squared error over the elements of an image::

    phi(e) = (k e / (exp(k e) - 1))^p                   1 at e = 0, falling towards 0
    z      = T (phi(err_w) - phi(err_l))
    loss   = mean err_w - beta mean log sigmoid(z)

Fine-tuning on the chosen image plus a bounded margin: once a pair is well separated only the first part is left. The
defaults are the code's. The revised paper prints another setting of the same formula, with its own b (8 for
preferences): beta = 1 / b, k = 1, T = 1, p = b. No reference is evaluated, ever.

Departures: the official ``exp(k e) - 1`` in float32 is off by some 2% in its gradient at errors around 0.003; phi here
is exact there. The same formula serves epsilon, v and flow; k and T were chosen for epsilon, unverified for flow.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.diffusion.random import rand_rows
from diffalign.errors import UserError, require_at_least
from diffalign.strategies.base import Kernel, LossOutput, Spec, Strategy, Terms
from diffalign.strategies.heads import accuracy
from diffalign.strategies.pair_kernel import DenoisingKernel, TimestepOptions
from diffalign.strategies.registry import register

_SERIES_BELOW = 0.1


@dataclass(frozen=True)
class MaPOConfig(TimestepOptions):
    """Constants of MaPO.

    Args:
        beta: weight of the margin term beside the error of the chosen image. 0.1: official code.
        snr_value: k, factor on the errors inside phi. 0.5: official code.
        margin_scale: T, factor on the difference of phi. 1000: official code (its number of training timesteps).
        power: p, exponent of phi. 1: official code; b in the revised paper.
        label_noise_prob: share of the pairs, drawn anew at each visit, whose images are exchanged: what wrong labels
            do. 0: official code.
    """

    beta: float = 0.1
    snr_value: float = 0.5
    margin_scale: float = 1000.0
    power: float = 1.0
    label_noise_prob: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(0, self, "beta")
        if not 0 <= self.label_noise_prob <= 1:
            raise UserError(f"label_noise_prob is {self.label_noise_prob}: expected a share from 0 to 1")


def phi(x: Tensor) -> Tensor:
    """Return ``x / (exp(x) - 1)`` for x >= 0 with exact values and gradients near 0, and no overflow for large x."""
    small = x < _SERIES_BELOW
    near = torch.where(small, x, torch.zeros_like(x))  # each branch finite where the other is taken, gradients too
    series = 1 - near / 2 + near**2 / 12 - near**4 / 720 + near**6 / 30240
    away = torch.where(small, torch.ones_like(x), x)
    return torch.where(small, series, away * torch.exp(-away) / -torch.expm1(-away))


def mapo_margin(err_w: Tensor, err_l: Tensor, config: MaPOConfig) -> Tensor:
    """Return the logit ``z`` of each pair, positive when the chosen image is denoised better.

    Args:
        err_w, err_l: (B,) errors of chosen and rejected images.
        config: k, T and p.
    """
    liked, disliked = (phi(config.snr_value * err) ** config.power for err in (err_w, err_l))
    return config.margin_scale * (liked - disliked)


@register(
    "mapo",
    summary="fine-tuning on the chosen image plus a bounded margin; no reference model",
    paper="Margin-aware Preference Optimization for Aligning Diffusion Models without Reference (arXiv 2406.06424)",
    repository="https://github.com/mapo-t2i/mapo",
)
class MaPO(Strategy):
    """Reference-free learning from pairs."""

    spec = Spec(data="pairs", needs_reference=False)
    Config = MaPOConfig

    def kernel(self) -> Kernel:
        """One timestep and one noise a pair."""
        return DenoisingKernel.drawing(self.config)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """``mean err_w - beta mean log sigmoid(z)`` over the pairs of the micro-batch."""
        err_w, err_l = terms.policy.mean(dim=1).chunk(2)
        if self.config.label_noise_prob:
            wrong = rand_rows(batch.seeds, "label-noise", err_w.device) < self.config.label_noise_prob
            err_w, err_l = torch.where(wrong, err_l, err_w), torch.where(wrong, err_w, err_l)
        z = mapo_margin(err_w, err_l, self.config)
        losses = err_w - self.config.beta * F.logsigmoid(z)
        metrics = {
            "loss": losses,
            "logit": z,
            "implicit_accuracy": accuracy(z),
            "effective_weight": torch.sigmoid(-z),
            "policy_error_chosen": err_w,
            "policy_error_rejected": err_l,
        }
        return LossOutput(losses.mean(), {name: value.detach() for name, value in metrics.items()})
