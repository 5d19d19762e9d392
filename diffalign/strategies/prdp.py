"""PRDP: predict the difference of two images' rewards by the difference of their trajectories' log-ratios.

Paper: Deng et al., "PRDP: Proximal Reward Difference Prediction for Large-Scale Reward Finetuning of Diffusion Models",
CVPR 2024, arXiv 2402.08714; the loss follows its appendix G. No official repository.

For trajectories of ONE caption, with means over the T steps::

    rhat      = mean_t (log pi - log pi_ref)
    rhat_clip = mean_t clamp(log pi - log pi_ref, old +- eps)        old: the same at the start of the epoch
    l(a, b)   = max((drhat - dr / beta)^2, (drhat_clip - dr / beta)^2)
    loss      = mean of l over pairs with dr > 0

The loss is huge by construction (``dr / beta`` is of the order 1e2 to 1e4): watch ``relative_loss``, which starts at 1.
The gradient norm must be clipped (``--max_grad_norm 1``). It couples all steps of all images of a caption, whose graphs
exist one pass at a time: first the densities, then one backward pass for each ``transitions_per_pass`` rows, exactly.
Captions whose images are all equally good have no pair; they count in the mean over captions. Densities are means over
the elements of latents, which the paper does not state and its constants imply. For flow models the steps are those of
Flow-GRPO.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.errors import UserError, require_above
from diffalign.rollouts.rollout import Rollout, RolloutConfig
from diffalign.rollouts.transitions import RecordedSteps, TransitionBatch, TransitionKernel, row_pieces
from diffalign.rollouts.updates import group_parts, group_rows, trained_steps
from diffalign.strategies.base import Context, Kernel, LossOutput, Piece, Spec, Terms, Update
from diffalign.strategies.heads import accuracy, differences
from diffalign.strategies.on_policy import FromRollouts
from diffalign.strategies.registry import register


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
    wanted = differences(rewards.to(log_prob) / beta)
    plain = differences(step.mean(1))
    proximal = differences(torch.clamp(step, old - eps, old + eps).mean(1))
    # which square is larger, found before the small differences are added to the large ones that are wanted: float32
    # keeps nothing of a trust region of 1e-6 beside 1e4
    worse = ((proximal - plain) * (proximal + plain - 2 * wanted)).detach() > 0
    losses = (torch.where(worse, proximal, plain) - wanted).square()
    return PairLosses(losses, differences(rewards) > 0)


@dataclass(frozen=True)
class PRDPConfig(RolloutConfig):
    """Constants of PRDP.

    Args:
        images_per_prompt: images of a caption in a rollout. 8: paper, large scale.
        updates_per_rollout: optimizer steps that share the captions of a rollout. 1: paper.
        inner_epochs: passes over a rollout. 1: paper, large scale (10 for 45 captions).
        beta: weight of the divergence from the reference. 3e-5: paper, several rewards.
        step_clip: half-width of the trust region of each step's log-density. 1e-4: paper, large scale.
    """

    images_per_prompt: int = 8
    updates_per_rollout: int = 1
    inner_epochs: int = 1
    beta: float = 3e-5
    step_clip: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_groups()
        require_above(0, self, "beta", "step_clip")


@register(
    "prdp",
    summary="the difference of two own samples' rewards, predicted by the difference of their log-ratios",
    paper="PRDP: Proximal Reward Difference Prediction for Reward Finetuning of Diffusion Models (arXiv 2402.08714)",
    family="on-policy",
)
class PRDP(FromRollouts):
    """Learns to predict reward differences of its own samples."""

    spec = Spec(
        data="prompts",
        needs_reward="black_box",
        lockstep="none",
        waived_guards=dict.fromkeys(("zero_gradient", "zero_loss"), "images that are all equally good make no pair"),
    )
    Config = PRDPConfig
    glossary: ClassVar[Mapping[str, str]] = {
        "relative_loss": "objective over that of a policy equal to the reference; 1 at the start, 0 at the optimum",
    }

    def kernel(self) -> Kernel:
        """Replay each step under policy and reference."""
        return TransitionKernel(self.config, "density")

    def collect(self, ctx: Context, batches: Sequence[ImageBatch]) -> Iterator[Update]:  # type: ignore[override]
        """Sample, judge, and share the captions out over updates; a micro-batch is a caption."""
        rollout = self._rollouts(ctx, batches)
        rows, figures = group_rows(rollout), rollout.figures()
        for epoch, captions in group_parts(rollout, self.config):
            made = [self._group(ctx, rollout, caption, rows[caption], epoch, figures) for caption in captions.tolist()]
            groups = [group for group in made if group is not None]
            differing = [group for group in groups if bool(group.fields["rewards"].std() > 0)]
            yield Update(differing or groups, weight=float(len(groups)))

    def pieces(self, ctx: Context, batch: TransitionBatch, draws: Any) -> list[Piece]:
        """As many passes as the rows of a caption need."""
        return row_pieces(ctx, self.config, self._kernel.rows(draws))

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: TransitionBatch) -> LossOutput:
        """Return the mean over the pairs of one caption."""
        rewards = batch.fields["rewards"][0]
        new, reference = (value[:, 0].view(len(rewards), -1) for value in (terms.policy, terms.reference))
        # all densities are relative to the recorded ones, which are thereby 0
        pairs = reward_difference_losses(
            new, torch.zeros_like(new), reference, rewards, self.config.beta, self.config.step_clip
        )
        predicted = differences((new - reference).detach().mean(1))[pairs.counted]
        right = accuracy(predicted).mean() if len(predicted) else torch.full((), 0.5)
        wanted = differences(rewards / self.config.beta)[pairs.counted].square().mean()
        loss = pairs.loss.detach()
        relative = (loss / wanted).nan_to_num(0.0)
        metrics = {"loss": loss[None], "relative_loss": relative[None], "implicit_accuracy": right[None]}
        return LossOutput(pairs.loss, batch.reported(metrics))

    def _group(
        self, ctx: Context, rollout: Rollout, caption: int, rows: Tensor, epoch: int, figures: Mapping[str, float]
    ) -> TransitionBatch | None:
        """Return the steps of a caption's images, image by image; None where fewer than two could be judged."""
        judged, trajectories = rollout.judged, rollout.trajectories
        assert trajectories is not None
        rows = rows[judged.valid[judged.own[rows]]]
        if len(rows) < 2:
            return None
        # the images of a caption are compared step by step: all are trained on the steps of the first
        drawn = trained_steps(trajectories.seeds[rows[:1]], self.config, trajectories.log_probs.shape[1], epoch)
        steps = drawn.expand(len(rows), -1)
        return TransitionBatch(
            ids=[rollout.ids[caption]],
            seeds=trajectories.seeds[rows[:1]],
            fields={"rewards": rollout.rewards[judged.own[rows]][None].to(ctx.device)},
            transitions=RecordedSteps(trajectories, rows[:, None].expand_as(steps).flatten(), steps.flatten()),
            figures=figures,
        )
