"""What the policy-gradient methods share: from rewards of a rollout to advantages, from replayed steps to a loss.

    loss = mean over transitions of  weight * max(-A r, -A clamp(r, 1 - c, 1 + c)) + kl_beta * divergence

``r`` is the ratio of new to recorded density, ``A`` the advantage of the image. The divergence is that of the step's
distribution from the reference's, a mean over elements: ``(mu - mu_ref)^2 / (2 s^2)`` with the deviation s of the step
("gaussian"), or without the time factor that s holds in a flow ("released", Flow-GRPO's code, to which the published
values of beta belong). For discrete processes the two are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rollouts.rollout import Judged, RolloutConfig
from diffalign.rollouts.transitions import TransitionBatch
from diffalign.strategies.advantages import PromptStatistics, StdScope, batch_advantages, group_advantages
from diffalign.strategies.base import LossOutput, Terms
from diffalign.strategies.policy_gradient import ClippedObjective

WAIVED: Mapping[str, str] = {
    "zero_gradient": "images that are all as good as expected have nothing to teach",
    "zero_loss": "advantages that cancel at a ratio of 1 give a loss of exactly 0",
}
"""Guards that do not apply where the loss is an advantage times a ratio."""


@dataclass(frozen=True)
class PolicyGradientConfig(RolloutConfig):
    """Constants of policy-gradient methods.

    Args:
        advantage: what is expected of an image: the mean of its caption over rollouts (once known), that of its group,
            or that of the rollout. "caption": official code of DDPO.
        advantage_std: for groups, whose deviation divides: the group's or the rollout's. "batch": Flow-GRPO's configs.
        statistics_size: rewards remembered of each caption. 16: official configs of DDPO.
        statistics_min_count: rewards a caption needs before its own statistics count; until then the rollout's do. 16:
            official configs of DDPO.
        clip_range: half-width of the trust region of the ratio. 1e-4: official code of DDPO and Flow-GRPO.
        advantage_limit: advantages are clamped to its plus and minus. 5: official code of both.
        kl_beta: weight of the divergence from the reference. 0: DDPO.
        kl_form: "released" or "gaussian", see above. "released": Flow-GRPO's code.
        detach_unconditional: no gradient through the unconditional branch of guidance. False: DDPO.
    """

    advantage: Literal["caption", "group", "batch"] = "caption"
    advantage_std: StdScope = "batch"
    statistics_size: int = 16
    statistics_min_count: int = 16
    clip_range: float = 1e-4
    advantage_limit: float = 5.0
    kl_beta: float = 0.0
    kl_form: Literal["released", "gaussian"] = "released"
    detach_unconditional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_beta < 0:
            raise UserError(f"kl_beta is {self.kl_beta}: expected 0 or more")
        if self.advantage == "group" and self.images_per_prompt < 2:
            raise UserError("advantage 'group' needs images_per_prompt of 2 at least: one image has nothing to beat")


class Advantages:
    """Estimates advantages as the configuration says, and remembers what that takes.

    Args:
        config: which estimator.
    """

    def __init__(self, config: PolicyGradientConfig) -> None:
        self._config = config
        self._statistics = PromptStatistics(config.statistics_size, config.statistics_min_count)

    def __call__(self, rewards: Tensor, judged: Judged) -> Tensor:
        """Return advantages, (n,); 0 where a reward failed.

        Args:
            rewards: (n,) of the images of all processes.
            judged: which caption and group they are of.
        """
        valid, config = judged.valid, self._config
        advantages = torch.zeros_like(rewards)
        kept = rewards[valid]
        if not len(kept):
            return advantages
        if config.advantage == "caption":
            advantages[valid] = self._statistics.update([str(key) for key in judged.captions[valid].tolist()], kept)
        elif config.advantage == "group":
            advantages[valid] = group_advantages(kept, judged.groups[valid], config.advantage_std)
        else:
            advantages[valid] = batch_advantages(kept)
        return advantages

    def state_dict(self) -> dict[str, Any]:
        """Return the remembered rewards."""
        return self._statistics.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        self._statistics.load_state_dict(state)


class PolicyObjective:
    """The loss of transitions.

    Args:
        config: clipping and penalty.
    """

    def __init__(self, config: PolicyGradientConfig) -> None:
        self._config = config
        self._clipped = ClippedObjective(config.clip_range, config.advantage_limit)

    def __call__(self, terms: Terms, batch: TransitionBatch) -> LossOutput:
        """Return the mean over transitions.

        Args:
            terms: log-ratios, and divergences from the reference where there is a penalty: (rows, 1 or 2).
            batch: fields "advantage", "extent" and, where steps do not weigh the same, "weight", each (rows,).
        """
        weight = batch.fields.get("weight")
        output = self._clipped(
            terms.policy[:, :1], batch.fields["advantage"], None if weight is None else weight[:, None]
        )
        metrics, loss = dict(output.metrics), output.loss
        if self._config.kl_beta:
            divergence = terms.policy[:, 1]
            if self._config.kl_form == "released":
                divergence = divergence * batch.fields["extent"].to(divergence)
            penalty = self._config.kl_beta * divergence
            loss = loss + penalty.mean()
            metrics["loss"] = metrics["loss"] + penalty.detach()
            metrics["reference_kl"] = divergence.detach()
        return LossOutput(loss, batch.reported(metrics))
