"""DDPO: the denoising steps of sampled images as actions, rewarded by any function of the image.

Paper: Black et al., "Training Diffusion Models with Reinforcement Learning", ICLR 2024, arXiv 2305.13301.
Official code: https://github.com/kvablack/ddpo-pytorch.

A rollout samples ``images_per_prompt`` images a caption with a stochastic sampler (DDIM with eta; for flow models the
SDE of Flow-GRPO), and keeps latents and densities. With A the standardised reward of an image and r the ratio of a
step's new density to the recorded one::

    loss = mean over images and steps of  max(-A r, -A clamp(r, 1 - c, 1 + c))

Densities are means over latent elements, which is why c is 1e-4. Guidance belongs to the policy: it is the same in
sampling and training. All steps of an image count in the same update. ``updates_per_rollout 1`` with ``inner_epochs 1``
is the score-function variant: the ratio is then 1 when its gradient is taken.

Departures: ``kl_beta`` adds a penalty that the paper leaves out (it stops early against over-optimisation instead), and
images with an advantage of exactly 0 are not replayed where there is no penalty; both still count in the mean.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.rollouts.rollout import Rollouts
from diffalign.rollouts.transitions import TransitionBatch, TransitionKernel
from diffalign.rollouts.updates import image_updates
from diffalign.strategies.base import Context, Kernel, LossOutput, Spec, Strategy, Terms, Update
from diffalign.strategies.on_policy import WAIVED, Advantages, PolicyGradientConfig, PolicyObjective
from diffalign.strategies.registry import register


@dataclass(frozen=True)
class DDPOConfig(PolicyGradientConfig):
    """Constants of DDPO; the defaults are those of its official code."""


@register(
    "ddpo",
    summary="clipped policy gradient on the denoising steps of own samples, for any reward",
    paper="Training Diffusion Models with Reinforcement Learning (arXiv 2305.13301)",
    repository="https://github.com/kvablack/ddpo-pytorch",
    family="on-policy",
)
class DDPO(Strategy):
    """Learns from rewards of its own samples."""

    spec = Spec(data="prompts", needs_reference=False, needs_reward="black_box", waived_guards=WAIVED)
    Config = DDPOConfig

    def __init__(self, config: PolicyGradientConfig) -> None:
        super().__init__(config)
        self.spec = replace(self.spec, needs_reference=config.kl_beta > 0)
        self._rollouts = Rollouts(config)
        self._advantages = Advantages(config)
        self._objective = PolicyObjective(config)

    @property
    def updates_per_batch(self) -> int:
        """Updates of a rollout."""
        return int(self.config.updates_per_batch)

    def kernel(self) -> Kernel:
        """Replay each step, beside the reference where distance from it is penalised."""
        config = self.config
        return TransitionKernel(
            config, "divergence" if config.kl_beta else "none", detach_null=config.detach_unconditional
        )

    def build(self, ctx: Context) -> None:
        """Start the scorers."""
        self._rollouts.open(ctx)

    def collect(self, ctx: Context, batches: Sequence[ImageBatch]) -> Iterator[Update]:  # type: ignore[override]
        """Sample, judge, and share the images out over updates."""
        rollout = self._rollouts(ctx, batches)
        advantages = self._advantages(rollout.rewards, rollout.judged)
        active = None if self.config.kl_beta else advantages != 0
        yield from image_updates(ctx, rollout, self.config, {"advantage": advantages}, active)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: TransitionBatch) -> LossOutput:
        """Return the mean over transitions."""
        return self._objective(terms, batch)

    def state_dict(self) -> dict[str, Any]:
        """Rewards of captions that the advantages remember."""
        return {"advantages": self._advantages.state_dict(), **self._rollouts.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if state.keys() - {"advantages", "rewards"}:
            raise ValueError(f"not a checkpoint of this method: it holds {sorted(state)}")
        self._advantages.load_state_dict(state["advantages"])
        self._rollouts.load_state_dict(state)
