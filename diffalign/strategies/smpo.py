"""SmPO-Diffusion: pairs count by how clearly a reward model prefers one image, at latents found by ReNoise inversion.

Paper: Lu et al., "Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models with Varied
Human Preferences", ICML 2025, arXiv 2506.02698. Official code: https://github.com/JaydenLyh/SmPO.

With s the reward of an image and err, ref_err mean squared errors at latents inverted by the current policy, each move
made with the mean of two predictions (:mod:`diffalign.strategies.inverted_noise`)::

    n    = (s - score_low) / (score_high - score_low)
    p    = sigmoid(n_w - n_l)
    z    = 0.5 beta gamma (2 p - 1) ((ref_err_w - err_w) - (ref_err_l - err_l))
    loss = mean over pairs of -log sigmoid(z)

An undecided pair (p = 1/2) has loss log 2 and gradient zero; ``p = (1 + 1/gamma) / 2`` gives InPO's loss. beta is that
of Diffusion-DPO, whose docstring gives its conversions; a gap of 0.01 in PickScore multiplies it by 0.3.

The scores come with the data (``fields["scores"]``: of the chosen and of the rejected image). The constants belong to
PickScore as a cosine, WITHOUT the logit scale of about 100: other scorers need their own range.

Departures: exact level matching, eval mode and a timestep for each pair, as in InPO. Pairs may keep the human order,
and pairs without scores may count as decided; the official code knows neither. Captions stay; the
official launcher drops a fifth of them: ``--caption_dropout 0.2``. v and flow are ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.data.schema import Example
from diffalign.diffusion.inversion import FixedPoint, LevelMatching, Refinement
from diffalign.errors import UserError, require_above
from diffalign.strategies.base import Kernel, LossOutput, Spec, Terms
from diffalign.strategies.inverted_noise import InvertedNoise, Inverter
from diffalign.strategies.pair_kernel import DenoisingKernel, draw_timesteps
from diffalign.strategies.pair_loss import PairConfig, PairErrors, PairObjective, PairStrategy
from diffalign.strategies.registry import register

TWO_PREDICTIONS = Refinement(FixedPoint(passes=1, average=(0, 2)))


@dataclass(frozen=True)
class SmPOConfig(PairConfig):
    """Constants of SmPO-Diffusion.

    Args:
        beta: inverse temperature on differences of mean errors. 2000: launcher for SD 1.5 (5000 for SDXL).
        gamma: factor on the smoothed label ``2 p - 1``. 10: official code.
        score_low: score that counts as 0. Least PickScore cosine of Pick-a-Pic v2: official code.
        score_high: score that counts as 1. Greatest one: official code.
        order_by: whose choice is the chosen image. "scorer": official code; "human" keeps the data's order, and a pair
            whose scores contradict it counts nothing.
        unscored: what happens to pairs without (finite) scores: "error", or "decided" to let them count as in InPO.
            error: ours, for a smoothed label cannot be made up.
        num_inversion_steps: moves of a whole inversion, two predictions each. 10: launcher for SDXL (5 for SD 1.5).
        level_matching: "exact" ends the inversion at the level that is trained; "official" at the next of its grid.
            exact: a departure, as in InPO.
        inverter: network that inverts. policy: official code.
    """

    beta: float = 2000.0
    gamma: float = 10.0
    score_low: float = 0.11543526500463486
    score_high: float = 0.28201571106910706
    order_by: Literal["scorer", "human"] = "scorer"
    unscored: Literal["error", "decided"] = "error"
    num_inversion_steps: int = 10
    level_matching: LevelMatching = "exact"
    inverter: Inverter = "policy"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.score_high <= self.score_low:
            raise UserError(f"score_high {self.score_high} must be greater than score_low {self.score_low}")
        require_above(0, self, "gamma")


def winner_probability(score_w: Tensor, score_l: Tensor, low: float, high: float) -> Tensor:
    """Return ``p = sigmoid(n_w - n_l)`` for scores (B,) in the scorer's units, scaled by its range."""
    return torch.sigmoid((score_w - score_l) / (high - low))


def label_weight(probability: Tensor, gamma: float) -> Tensor:
    """Return ``gamma (2 p - 1)``, the factor on a pair's margin: positive where the chosen image scores higher."""
    return gamma * (2 * probability - 1)


@register(
    "smpo",
    summary="pairs weighted by a reward model's certainty, at latents found by ReNoise inversion",
    paper="Smoothed Preference Optimization via ReNoise Inversion (arXiv 2506.02698)",
    repository="https://github.com/JaydenLyh/SmPO",
)
class SmPO(PairStrategy):
    """Learns most from pairs that differ clearly."""

    spec = Spec(data="pairs", lockstep="all_but_draw")
    Config = SmPOConfig
    glossary: ClassVar[Mapping[str, str]] = {
        "label_weight": "factor on the margin that the smoothed label gives",
    }

    def __init__(self, config: SmPOConfig) -> None:
        super().__init__(config)
        self.spec = replace(self.spec, moving_reference=config.inverter == "policy")
        self.objective = PairObjective(config)

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Refuse pairs without scores where these do not count as decided."""
        if self.config.unscored == "decided":
            return
        unknown = (math.nan, math.nan)
        missing = [e.id for e in examples if not all(map(math.isfinite, e.fields.get("scores", unknown)))]  # type: ignore[arg-type]
        if missing:
            raise _without_scores(missing, len(examples))

    def kernel(self) -> Kernel:
        """Errors at latents inverted with two predictions a move."""
        c: SmPOConfig = self.config
        drawn = partial(draw_timesteps, floor=c.timestep_floor)
        return DenoisingKernel(
            InvertedNoise(c.num_inversion_steps, c.level_matching, c.inverter, TWO_PREDICTIONS, timesteps=drawn)
        )

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Return the mean of ``-log sigmoid(z)`` over the pairs."""
        errors = PairErrors.of(terms)
        weight = self._weights(batch).to(errors.err_w)
        if self.config.order_by == "scorer":
            errors, weight = errors.swapped(weight < 0), weight.abs()
        output = self.objective(errors, weight.clamp(min=0))
        return replace(output, metrics={**output.metrics, "label_weight": weight})

    def _weights(self, batch: ImageBatch) -> Tensor:
        """Return ``gamma (2 p - 1)`` of each pair, (B,); 1 for pairs that count as decided."""
        config: SmPOConfig = self.config
        scores = batch.fields.get("scores")
        if scores is None:
            scores = torch.full((batch.size, 2), torch.nan)
        score_w, score_l = scores.unbind(dim=1)
        probability = winner_probability(score_w, score_l, config.score_low, config.score_high)
        weight = label_weight(probability, config.gamma)
        if config.unscored == "decided":
            return torch.where(weight.isfinite(), weight, 1.0)
        if not scores.isfinite().all():
            missing = [name for name, row in zip(batch.ids, scores, strict=True) if not row.isfinite().all()]
            raise _without_scores(missing, batch.size)
        return weight


def _without_scores(ids: Sequence[str], seen: int) -> UserError:
    return UserError(
        f"'smpo' needs a score of both images of a pair, yet {ids[0]!r} ({len(ids)} of {seen} pairs) has none: "
        "add the column 'scores', or give --unscored decided"
    )
