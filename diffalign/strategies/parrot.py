"""Parrot: policy gradient from those images only that no other image of the batch dominates in all rewards.

Paper: Lee et al., "Parrot: Pareto-optimal Multi-Reward Reinforcement Learning Framework for Text-to-Image Generation",
ECCV 2024, arXiv 2401.05675. No official code.

The images of a caption are sampled for one of the R rewards, k, whose identifier ``<reward k>`` stands before the
caption. P is the set of images that no other image of the group dominates in all rewards, n its size, N the group's::

    loss = mean over images and steps of  [i in P] (N / n) max(-A r, -A clamp(r, 1 - c, 1 + c))       "clipped"
         = mean over images and steps of -[i in P] (N / n) r_k r                                      "score_function"

with r the ratio of new to recorded density, r_k the raw reward, and A that reward standardised inside the group. The
paper has the score function with raw rewards, which pushes members of P *down* where rewards are negative, and knows no
baseline; "clipped" is the default here.

Departures: the paper sums over the steps, and the mean makes the loss smaller by their number. Each visit of a caption
is for one reward, drawn by its seed; the paper goes through all of them, which is the same in expectation. Rewards see
the original caption. ``expansion`` names a function that lengthens captions before they are sampled; training the
expanding model is not part of this method. With small groups or many rewards nearly all images are on the front, and
the selection does nothing: the figure ``front_share`` tells (0.2 to 0.3 in the paper).

At inference, identifiers of all wanted rewards stand before the caption, and ``diffusion.guidance.centred`` keeps an
expanded caption near the original one.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.errors import UserError
from diffalign.rewards.transforms import dominates
from diffalign.rollouts.rollout import Rollout
from diffalign.strategies.advantages import group_advantages
from diffalign.strategies.base import Context, Update
from diffalign.strategies.on_policy import PolicyGradient, PolicyGradientConfig
from diffalign.strategies.policy_gradient import ClippedObjective
from diffalign.strategies.registry import register


def pareto_mask(rewards: Tensor) -> Tensor:
    """Return which images no other one dominates, (n,) bool; never empty, equal images do not dominate each other.

    Args:
        rewards: (n, R) of images of ONE caption, finite.
    """
    return ~dominates(rewards).any(dim=0)


@dataclass(frozen=True)
class ParrotConfig(PolicyGradientConfig):
    """Constants of Parrot.

    Args:
        images_per_prompt: images of a caption, among which the front is found. 256: paper.
        updates_per_rollout: optimizer steps that share the images of a rollout. 1: paper.
        objective: "clipped" or "score_function", see above. "score_function": paper.
        clip_range: half-width of the trust region of the ratio, of the clipped objective. 1e-4: official code of DDPO.
        advantage_limit: advantages are clamped to its plus and minus, in the clipped objective. 5: likewise.
        identifiers: put ``<reward k>`` before captions where there are several rewards. True: paper.
        expansion: ``MODULE:FUNCTION`` that turns a list of captions into longer ones; empty for none.
    """

    images_per_prompt: int = 256
    updates_per_rollout: int = 1
    objective: Literal["clipped", "score_function"] = "clipped"
    identifiers: bool = True
    expansion: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_groups()

    @property
    def clipped(self) -> ClippedObjective:
        """The surrogate on log-ratios; the score function knows no bounds."""
        return super().clipped if self.objective == "clipped" else ClippedObjective(math.inf, math.inf)


@register(
    "parrot",
    summary="policy gradient on several rewards at once, from samples that no other one dominates",
    paper="Parrot: Pareto-optimal Multi-Reward RL Framework for Text-to-Image Generation (arXiv 2401.05675)",
    family="on-policy",
)
class Parrot(PolicyGradient):
    """Learns from the Pareto front of its own samples."""

    Config = ParrotConfig
    glossary: ClassVar[Mapping[str, str]] = {
        "front_share": "share of the rollout's images that no other image of their caption dominates",
    }

    def __init__(self, config: ParrotConfig) -> None:
        super().__init__(config)
        self._expand = _function(config.expansion) if config.expansion else None

    def collect(self, ctx: Context, batches: Sequence[ImageBatch]) -> Iterator[Update]:  # type: ignore[override]
        """Sample under the captions as the policy is to see them, then go on as every policy gradient."""
        return super().collect(ctx, [self._worded(ctx, batch) for batch in batches])

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return the reward that each image was sampled for, standardised unless the objective is the paper's, (n,)."""
        judged = rollout.judged
        advantages = judged.rewards.new_zeros(len(judged.seeds))
        meant = judged.rewards.gather(1, _meant_for(judged.groups, len(rollout.names))[:, None])[:, 0][judged.valid]
        if self.config.objective == "clipped":
            # by the group's own deviation: groups are judged by different rewards, whose scales have nothing in common
            meant = group_advantages(meant, judged.groups[judged.valid], "group")
        advantages[judged.valid] = meant
        return advantages

    def weights(self, rollout: Rollout) -> Tensor:
        """Return ``N / n`` on the front of each group, 0 elsewhere, (n,)."""
        judged = rollout.judged
        weights = judged.rewards.new_zeros(len(judged.seeds))
        for group in judged.groups.unique():
            rows = ((judged.groups == group) & judged.valid).nonzero().flatten()
            if len(rows):
                front = pareto_mask(judged.rewards[rows])
                weights[rows] = front.to(weights) * (len(rows) / front.sum())
        return weights

    def figures(self, rollout: Rollout) -> dict[str, float]:
        """The share of images on a front, besides what every rollout reports."""
        share = (self.weights(rollout) > 0).float().mean()
        return {**super().figures(rollout), "front_share": float(share)}

    def _worded(self, ctx: Context, batch: ImageBatch) -> ImageBatch:
        """Return a batch under expanded captions with identifiers; ``prompts`` stay those that rewards see."""
        captions, count = list(batch.prompts), len(ctx.rewards)
        if self._expand is not None:
            captions = list(self._expand(captions))
            if len(captions) != batch.size:
                raise UserError(f"{self.config.expansion} made {len(captions)} captions of {batch.size}")
        if self.config.identifiers and count > 1:
            meant = _meant_for(batch.seeds, count).tolist()
            captions = [f"<reward {k + 1}> {caption}" for k, caption in zip(meant, captions, strict=True)]
        if captions == list(batch.prompts):
            return batch
        condition = ctx.policy.encode_prompts(captions).to(ctx.device).completed(batch.condition)
        return batch.with_conditions((condition,))


def _meant_for(seeds: Tensor, rewards: int) -> Tensor:
    """Return which reward a group is sampled for, as its seed decides."""
    return seeds % rewards


def _function(path: str) -> Callable[[list[str]], Sequence[str]]:
    module, colon, name = path.partition(":")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"expansion {path!r} names no function: write MODULE:FUNCTION ({error})") from None
    if not colon or not callable(found):
        raise UserError(f"expansion {path!r} names no function: write MODULE:FUNCTION")
    return found  # type: ignore[no-any-return]
