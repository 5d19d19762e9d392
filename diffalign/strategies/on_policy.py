"""What the policy-gradient methods share: from rewards of a rollout to advantages, from replayed steps to a loss.

    loss = mean over transitions of  weight * max(-A r, -A clamp(r, 1 - c, 1 + c)) + kl_beta * divergence

``r`` is the ratio of new to recorded density, ``A`` the advantage of the image. The divergence is that of the step's
distribution from the reference's, a mean over elements: ``(mu - mu_ref)^2 / (2 s^2)`` with the deviation s of the step
("gaussian"), or without the time factor that s holds in a flow ("released", Flow-GRPO's code, to which the published
values of beta belong). For discrete processes the two are one.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.errors import UserError
from diffalign.rollouts.rollout import Rollout, RolloutConfig, Rollouts
from diffalign.rollouts.transitions import TransitionBatch, TransitionKernel
from diffalign.rollouts.updates import image_updates
from diffalign.strategies.base import Context, Kernel, LossOutput, Spec, Strategy, Terms, Update
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
        clip_range: half-width of the trust region of the ratio. 1e-4: official code of DDPO and Flow-GRPO.
        advantage_limit: advantages are clamped to its plus and minus. 5: official code of both.
        kl_beta: weight of the divergence from the reference. 0: DDPO.
        kl_form: "released" or "gaussian", see above. "released": Flow-GRPO's code.
        detach_unconditional: no gradient through the unconditional branch of guidance. False: DDPO.
    """

    clip_range: float = 1e-4
    advantage_limit: float = 5.0
    kl_beta: float = 0.0
    kl_form: Literal["released", "gaussian"] = "released"
    detach_unconditional: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kl_beta < 0:
            raise UserError(f"kl_beta is {self.kl_beta}: expected 0 or more")

    @property
    def clipped(self) -> ClippedObjective:
        """The surrogate on log-ratios."""
        return ClippedObjective(self.clip_range, self.advantage_limit)


class PolicyObjective:
    """The loss of transitions.

    Args:
        config: clipping and penalty.
        per_time: divide the loss of a step, not the penalty, by the time ``-dt`` that the step takes.
    """

    def __init__(self, config: PolicyGradientConfig, per_time: bool = False) -> None:
        self._config, self._per_time = config, per_time
        self._clipped = config.clipped

    def __call__(self, terms: Terms, batch: TransitionBatch) -> LossOutput:
        """Return the mean over transitions.

        Args:
            terms: log-ratios, and divergences from the reference where there is a penalty: (rows, 1 or 2).
            batch: fields "advantage", "extent", the time ``-dt``, and "weight" where images do not weigh the same; each
                (rows,).
        """
        weight = batch.fields.get("weight", torch.ones_like(batch.fields["advantage"]))
        if self._per_time:
            weight = weight / batch.fields["extent"]
        output = self._clipped(terms.policy[:, :1], batch.fields["advantage"], weight[:, None])
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


class FromRollouts(Strategy):
    """A method that learns from rollouts: it opens them, says what they cost, and saves what they remember.

    Args:
        config: how images are sampled and shared out.
        keep_means: record the means of all transitions.
    """

    def __init__(self, config: RolloutConfig, keep_means: bool = False) -> None:
        super().__init__(config)
        self.spec = replace(self.spec, replays=True)
        self._rollouts = Rollouts(config, keep_means)

    @property
    def updates_per_batch(self) -> int:
        """Updates of a rollout."""
        return int(self.config.updates_per_rollout * self.config.inner_epochs)

    @property
    def rows_per_pass(self) -> int:
        """Transitions of a pass, twice where guidance evaluates both branches."""
        return int(self.config.transitions_per_pass * (1 if self.config.rollout_guidance_scale == 1 else 2))

    def build(self, ctx: Context) -> None:
        """Start the scorers."""
        self._rollouts.open(ctx)

    def state_dict(self) -> dict[str, Any]:
        """What rewards remember of images."""
        return self._rollouts.state_dict()

    def advise(self, metrics: Mapping[str, float]) -> str:
        """Say so where the images of a caption are all alike to the reward."""
        if metrics.get("flat_groups") != 1:
            return ""
        return (
            "all images of a caption have had the same reward, so nothing is learned: take a graded reward, more "
            "images a caption, or harder captions"
        )

    def close(self) -> None:
        """End the scorers' threads."""
        self._rollouts.close()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if odd := state.keys() - {"rewards"}:
            raise ValueError(f"not a checkpoint of {type(self).__name__}: it holds {sorted(odd)}")
        self._rollouts.load_state_dict(state)


class PolicyGradient(FromRollouts):
    """What all policy gradients have in common; each has its constants and its idea of an advantage.

    Args:
        config: constants.
        normalise_ratio: normalise log-ratios by the means of the recorded transitions, and divide losses by ``-dt``.
    """

    spec = Spec(data="prompts", needs_reference=False, needs_reward="black_box", lockstep="none", waived_guards=WAIVED)
    Config = PolicyGradientConfig

    def __init__(self, config: PolicyGradientConfig, normalise_ratio: bool = False) -> None:
        self._normalise = normalise_ratio
        super().__init__(config, keep_means=normalise_ratio)
        self.spec = replace(self.spec, needs_reference=config.kl_beta > 0)
        self._objective = PolicyObjective(config, normalise_ratio)

    def kernel(self) -> Kernel:
        """Replay each step, beside the reference where distance from it is penalised."""
        config = self.config
        return TransitionKernel(
            config,
            "divergence" if config.kl_beta else "none",
            normalise=self._normalise,
            detach_null=config.detach_unconditional,
        )

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Tensor:
        """Return the advantage of each image of all processes, (n,); 0 where a reward failed."""

    def figures(self, rollout: Rollout) -> dict[str, float]:
        """Return what to report of a rollout."""
        return rollout.figures()

    def weights(self, rollout: Rollout) -> Tensor | None:
        """Return the factor on the loss of each image of all processes, (n,); None for 1."""
        return None

    def collect(self, ctx: Context, batches: Sequence[ImageBatch]) -> Iterator[Update]:  # type: ignore[override]
        """Sample, judge, and share the images out over updates."""
        rollout = self._rollouts(ctx, batches)
        advantages, weights = self.advantages(rollout), self.weights(rollout)
        moves = advantages if weights is None else advantages * weights
        fields = {"advantage": advantages} if weights is None else {"advantage": advantages, "weight": weights}
        active = None if self.config.kl_beta else moves != 0
        yield from image_updates(ctx, rollout, self.config, fields, self.figures(rollout), active)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: TransitionBatch) -> LossOutput:
        """Return the mean over transitions."""
        return self._objective(terms, batch)
