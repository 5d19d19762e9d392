"""D3PO: direct preference optimisation of every denoising step of two sampled trajectories.

Paper: Yang et al., "Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model", CVPR 2024, arXiv
2311.13231. Official code: https://github.com/yk7333/d3po.

With ``L_i`` the step's log-density under the policy minus that under the reference, for trajectories 0 and 1::

    q_i  = clamp(L_i, log(1 - eps), log(1 + eps))
    loss = mean over pairs of -log sigmoid(beta (h_0 q_0 + h_1 q_1))

``h`` is +1 for the preferred trajectory, -1 for the other, 0 for both in a tie (loss log 2, no gradient). The clamp is
in the code only; the paper's image quality depends on it. Clamping the logarithm has the value and gradient of the
code's clamp of the ratio, without overflow.

The images of a caption start from the same noise and differ by the sampler's. Every pair of them is compared, at every
step on its own; of several rewards none may be lower in the preferred image (``compare dominance``, official code), or
their weighted sum decides. Steps of tied pairs are not replayed; they count in the mean.

With ``labelled`` people decide: images are sampled by ``train_scripts/sample_for_labels.py``, judged in the labelling
app (comparing, or tagging defects), exported, and given as ``--prompts``. The reference, the start of training, then
samples the same trajectories again from the seeds on record. The next round starts from the trained adapter.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.data.pairing import ROLLOUT
from diffalign.data.schema import Example
from diffalign.errors import require_above
from diffalign.rollouts.labelled import as_sampled, read_labels
from diffalign.rollouts.provenance import Provenance
from diffalign.rollouts.rollout import Rollout, RolloutConfig
from diffalign.rollouts.transitions import RecordedSteps, TransitionBatch, TransitionKernel, joined_ids, rows_per_pass
from diffalign.rollouts.updates import group_parts, group_rows, trained_steps
from diffalign.strategies.base import Context, Kernel, LossOutput, Piece, Spec, Terms, Update
from diffalign.strategies.heads import accuracy
from diffalign.strategies.on_policy import FromRollouts
from diffalign.strategies.registry import register


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
        eps: half-width of the range, above 0; from 1 on the ratio has no lower bound. 0.1: official code.
    """
    lowest = math.log1p(-eps) if eps < 1 else -math.inf
    return (log_prob - ref_log_prob).clamp(lowest, math.log1p(eps))


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


@dataclass(frozen=True)
class D3POConfig(RolloutConfig):
    """Constants of D3PO.

    Args:
        images_per_prompt: images of a caption in a rollout, all of whose pairs are compared. 2: official code.
        rollout_steps: sampling steps. 20: official code.
        same_start: the images of a caption share their initial noise. True: official code.
        updates_per_rollout: optimizer steps that share the captions of a rollout. 20: official code, a pair a step.
        beta: inverse temperature. 0.1: official code.
        ratio_clip: half-width of the range of each ratio, above 0. 0.1: official code; images fall apart without.
        compare: with several rewards: "dominance" (official code), or "sum", their weighted sum.
        labelled: the captions come with human labels of images that the start of training has sampled. False: a reward
            compares.
    """

    images_per_prompt: int = 2
    rollout_steps: int = 20
    same_start: bool = True
    updates_per_rollout: int = 20
    beta: float = 0.1
    ratio_clip: float = 0.1
    compare: Literal["dominance", "sum"] = "dominance"
    labelled: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_groups()
        require_above(0, self, "beta", "ratio_clip")


@register(
    "d3po",
    summary="every denoising step of the better of two own samples against that of the other",
    paper="Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model (arXiv 2311.13231)",
    repository="https://github.com/yk7333/d3po",
    family="on-policy",
)
class D3PO(FromRollouts):
    """Learns from comparisons of its own samples."""

    spec = Spec(
        data="prompts",
        needs_reward="black_box",
        lockstep="none",
        waived_guards={"zero_gradient": "images that tie, or ratios beyond their range, have nothing to teach"},
    )
    Config = D3POConfig

    def __init__(self, config: D3POConfig) -> None:
        super().__init__(config)
        self._origins: dict[Provenance | None, str] = {}  # of the labelled images -> the first row that has it
        if config.labelled:
            self.spec = replace(self.spec, needs_reward=None)

    def kernel(self) -> Kernel:
        """Replay each step under policy and reference."""
        return TransitionKernel(self.config, "density")

    def build(self, ctx: Context) -> None:
        """Start the scorers, where there are any.

        Raises:
            UserError: if the labelled images were not sampled by the start of this run.
        """
        if not self.config.labelled:
            super().build(ctx)
            return
        self._start = Provenance.of_start(ctx)
        for origin, name in self._origins.items():
            self._start.require_same(origin or self._start, name)

    def collect(self, ctx: Context, batches: Sequence[ImageBatch]) -> Iterator[Update]:  # type: ignore[override]
        """Sample, compare, and share the captions out over updates."""
        rollout = self._judged_by_people(ctx, batches) if self.config.labelled else self._rollouts(ctx, batches)
        rows, figures = group_rows(rollout), rollout.figures()
        for epoch, captions in group_parts(rollout, self.config):
            pairs = _pairs(rows[captions])
            pairs = pairs[rollout.judged.valid[rollout.judged.own[pairs]].all(1)]
            if rollout.trajectories is None or not len(pairs):
                yield Update([], weight=0.0)
                continue
            steps = trained_steps(
                rollout.trajectories.seeds[pairs[:, 0]], self.config, rollout.trajectories.log_probs.shape[1], epoch
            )
            yield Update(list(self._batches(ctx, rollout, pairs, steps, figures)), weight=float(steps.numel()))

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Refuse captions without the labels that people gave, where these are asked for."""
        for example in examples if self.config.labelled else ():
            read_labels(example.id, example.metadata, self.config)
            self._origins.setdefault(Provenance.recorded(example.metadata[ROLLOUT]), example.id)

    def describe(self, ctx: Context) -> tuple[str, ...]:
        """Whether it is unknown where the labelled images come from."""
        if None not in self._origins:
            return ()
        return (
            f"note: row {self._origins[None]!r}, as those of earlier versions, does not say which model sampled its "
            "images, at which size and precision: unless all are the run's own, the labels belong to other images",
        )

    def pieces(self, ctx: Context, batch: TransitionBatch, draws: Any) -> list[Piece]:
        """One: batches have the size of a pass."""
        return [Piece()]

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: TransitionBatch) -> LossOutput:
        """Return the mean over pairs of steps."""
        first, second = clipped_log_ratio(terms.policy, terms.reference, self.config.ratio_clip)[:, 0].chunk(2)
        output = d3po_loss(first, second, batch.fields["signs"].to(first), self.config.beta)
        return LossOutput(output.loss, batch.reported(output.metrics))

    def _judged_by_people(self, ctx: Context, batches: Sequence[ImageBatch]) -> Rollout:
        """Sample once more, from the reference, what has been labelled."""
        assert ctx.reference is not None
        self._require_own(batches)
        seen = [as_sampled(batch, self.config) for batch in batches]
        labels = torch.cat([scores for _, scores in seen], dim=1).reshape(-1, 1) if seen else torch.zeros(0, 1)
        with ctx.reference.active() as reference:
            return self._rollouts(replace(ctx, policy=reference), [batch for batch, _ in seen], labels)

    def _require_own(self, batches: Sequence[ImageBatch]) -> None:
        """Refuse images that another model sampled, also those of streams, of which nothing is known at the start."""
        for batch in batches:
            for name, row in zip(batch.ids, batch.metadata, strict=False):
                self._start.require_same(Provenance.recorded(row.get(ROLLOUT, {})) or self._start, name)

    def _batches(
        self, ctx: Context, rollout: Rollout, pairs: Tensor, steps: Tensor, figures: Mapping[str, float]
    ) -> Iterator[TransitionBatch]:
        """Yield micro-batches of pairs of transitions; both members of a pair are at the same step."""
        judged, trajectories = rollout.judged, rollout.trajectories
        assert trajectories is not None
        scores = rollout.rewards[:, None] if self.config.compare == "sum" else judged.rewards
        signs = preference_signs(*(scores[judged.own[pairs[:, side]]] for side in (0, 1)))
        decided = signs[:, 0] != 0
        kept = decided if bool(decided.any()) else torch.ones_like(decided)
        moves = steps[kept].flatten()
        sides = [pairs[kept, side][:, None].expand_as(steps[kept]).flatten() for side in (0, 1)]
        spread = signs[kept][:, None].expand(-1, steps.shape[1], -1).flatten(0, 1)
        size = max(1, rows_per_pass(ctx, self.config) // 2)
        for start in range(0, len(moves), size):
            here = slice(start, start + size)
            images, both = torch.cat([side[here] for side in sides]), moves[here].repeat(2)
            yield TransitionBatch(
                ids=joined_ids(rollout.ids, sides[1][here], moves[here]),
                seeds=trajectories.seeds[sides[0][here]],
                fields={"signs": spread[here].to(ctx.device)},
                transitions=RecordedSteps(trajectories, images, both),
                figures=figures,
            )


def _pairs(groups: Tensor) -> Tensor:
    """Return all pairs of the images of each group (b, images): (pairs, 2) rows."""
    return torch.cat([torch.combinations(group) for group in groups]) if len(groups) else groups.new_zeros(0, 2)
