"""Steps of sampled trajectories as training examples: replayed under the weights as they are now.

A row is one step of one image. Terms are ``(rows, K)``: the log-ratio of new to recorded density, and, where the method
penalises distance from a reference, the divergence of the step from the reference's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.batch import Batch, Condition
from diffalign.diffusion.sde import Transition, gaussian_kl, normalised_log_ratio
from diffalign.policies.base import Policy
from diffalign.rollouts.rollout import RolloutConfig
from diffalign.rollouts.steps import StochasticSteps
from diffalign.rollouts.trajectory import Trajectories, guided_prediction
from diffalign.strategies.base import Context, Piece


@dataclass(frozen=True)
class Transitions:
    """Steps of images, one a row.

    Args:
        steps: (rows,) int64 index of the move.
        before, after: (rows, channels, ...) latents.
        log_probs: (rows,) recorded when the step was drawn.
        condition: (rows) the captions.
        guidance_scale: with which they were sampled.
        means: (rows, channels, ...) of the recorded transitions, where they were kept.
    """

    steps: Tensor
    before: Tensor
    after: Tensor
    log_probs: Tensor
    condition: Condition
    guidance_scale: float = 1.0
    means: Tensor | None = None

    def __len__(self) -> int:
        return len(self.steps)

    def select(self, rows: Tensor | slice | None) -> Transitions:
        """Return some rows; all of them for None."""
        if rows is None:
            return self
        return Transitions(
            self.steps[rows],
            self.before[rows],
            self.after[rows],
            self.log_probs[rows],
            self.condition.select(rows),
            self.guidance_scale,
            None if self.means is None else self.means[rows],
        )

    def to(self, device: torch.device) -> Transitions:
        """Move to a device, latents at least in float32."""
        wide = torch.promote_types(self.before.dtype, torch.float32)
        return Transitions(
            self.steps.to(device),
            self.before.to(device, wide),
            self.after.to(device, wide),
            self.log_probs.to(device),
            self.condition.to(device),
            self.guidance_scale,
            None if self.means is None else self.means.to(device),
        )

    def replay(self, policy: Policy, steps: StochasticSteps, detach_null: bool = False) -> Transition:
        """Return the distributions of the steps under a policy.

        Args:
            policy: as it is now, or a reference.
            steps: the sampler that was sampled with.
            detach_null: no gradient through the unconditional branch.
        """
        predict = guided_prediction(policy, self.condition, self.guidance_scale, detach_null)
        prediction = predict(self.before, steps.timesteps(self.steps, len(self), self.before.device))
        return steps.transition(self.steps, prediction, self.before)


@dataclass(frozen=True)
class RecordedSteps:
    """Which steps of which recorded images: rows that are copied out when their micro-batch is trained, not before.

    All micro-batches of an update share the trajectories, and an image's caption is held once, not once a step.

    Args:
        trajectories: the images.
        images, steps: (rows,) int64 image and move of each row.
    """

    trajectories: Trajectories
    images: Tensor
    steps: Tensor

    def __len__(self) -> int:
        return len(self.steps)

    def read(self) -> Transitions:
        """Copy the rows out."""
        trajectories, images, steps = self.trajectories, self.images, self.steps
        here, device = images.to(trajectories.latents.device), trajectories.log_probs.device
        there = steps.to(here.device)
        return Transitions(
            steps,
            trajectories.latents[here, there],
            trajectories.latents[here, there + 1],
            trajectories.log_probs[images.to(device), steps.to(device)],
            trajectories.condition.select(images.to(device)),
            trajectories.guidance_scale,
            None if trajectories.means is None else trajectories.means[here, there],
        )


@dataclass(frozen=True)
class TransitionBatch(Batch):
    """A micro-batch of transitions; several rows an example, in block order, where a method compares images.

    Args:
        transitions: (N * B) rows of B examples.
        figures: what to report of the rollout that the batch is part of.
    """

    transitions: RecordedSteps | None = None
    figures: Mapping[str, float] = field(default_factory=dict)

    def reported(self, metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return metrics with the rollout's figures."""
        return {**metrics, **{name: torch.tensor(value) for name, value in self.figures.items()}}


@dataclass(frozen=True)
class Replay:
    """What is replayed in a micro-batch.

    Args:
        steps: the sampler.
        transitions: the rows, on the policy's device.
        reference_means: (rows, channels, ...) where the reference would go, for a penalty on the distance.
    """

    steps: StochasticSteps
    transitions: Transitions
    reference_means: Tensor | None = None

    def select(self, rows: slice | None) -> Replay:
        """Return some rows; all of them for None."""
        if rows is None:
            return self
        means = None if self.reference_means is None else self.reference_means[rows]
        return Replay(self.steps, self.transitions.select(rows), means)


@dataclass(frozen=True)
class TransitionKernel:
    """Replays transitions under policy and reference.

    Args:
        config: how they were sampled.
        reference: what the method asks of the reference: nothing, densities (frozen values "reference", relative to the
            recorded ones), or the divergence of each step (a second column of the terms, a mean over elements).
        normalise: replace the log-ratio by the normalised one of Pref-GRPO; needs recorded means.
        detach_null: no gradient through the unconditional branch.
    """

    config: RolloutConfig
    reference: Literal["none", "density", "divergence"] = "none"
    normalise: bool = False
    detach_null: bool = False

    def draw(self, ctx: Context, batch: TransitionBatch) -> Replay:
        """Bring the rows to the device; nothing is drawn. Evaluates the reference where whole latents are compared."""
        assert batch.transitions is not None
        steps, transitions = self.config.sampler(ctx.policy.process), batch.transitions.read().to(ctx.device)
        if self.reference != "divergence":
            return Replay(steps, transitions)
        assert ctx.reference is not None
        with ctx.reference.active() as reference:
            means = transitions.replay(reference, steps).mean
        return Replay(steps, transitions, means)

    def rows(self, draws: Replay) -> int:
        """Number of rows."""
        return len(draws.transitions)

    def terms(self, ctx: Context, batch: Any, draws: Replay, piece: Piece) -> Tensor:
        """Log-ratios of the policy to what was recorded, and divergences from the reference: (rows, 1 or 2)."""
        here = draws.select(piece.rows)
        seen = here.transitions
        transition = seen.replay(ctx.policy, here.steps, self.detach_null)
        ratio = transition.log_prob(seen.after) - seen.log_probs
        if self.normalise:
            assert seen.means is not None
            ratio = normalised_log_ratio(ratio, transition.mean, seen.means, transition.std)
        columns = [ratio]
        if here.reference_means is not None:
            columns.append(gaussian_kl(transition.mean, here.reference_means, transition.std))
        return torch.stack(columns, dim=1)

    def frozen(self, ctx: Context, batch: Any, draws: Replay, piece: Piece) -> Mapping[str, Tensor]:
        """Log-ratios of the reference to what was recorded, ``{"reference": (rows, 1)}``, where they are asked for."""
        if self.reference != "density":
            return {}
        assert ctx.reference is not None
        here = draws.select(piece.rows)

        def ratio(policy: Policy) -> Tensor:
            density = here.transitions.replay(policy, here.steps).log_prob(here.transitions.after)
            return (density - here.transitions.log_probs)[:, None]

        return {"reference": ctx.reference.evaluate(ratio)}


def rows_per_pass(ctx: Context, config: RolloutConfig) -> int:
    """Rows of one pass with a graph."""
    return min(config.transitions_per_pass, ctx.max_rows or config.transitions_per_pass)


def row_pieces(ctx: Context, config: RolloutConfig, rows: int) -> list[Piece]:
    """Cut rows that share a loss into passes."""
    size = rows_per_pass(ctx, config)
    if rows <= size:
        return [Piece()]
    return [Piece(rows=slice(start, min(start + size, rows))) for start in range(0, rows, size)]


def joined_ids(ids: Sequence[str], images: Tensor, steps: Tensor) -> list[str]:
    """Name transitions by caption, image of the caption, and step; images count in block order."""
    count = len(ids)
    pairs = zip(images.tolist(), steps.tolist(), strict=True)
    return [f"{ids[image % count]}/image {image // count}/step {step}" for image, step in pairs]
