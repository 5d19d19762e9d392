"""What methods share that follow the gradient of a differentiable reward through the sampler.

A kernel samples without a gradient up to some point (in ``draw``: once, however often the rest is evaluated) and from
there to clean latents with one (``arrive``, in ``terms``). Terms are the rewards of the decoded images and, where a
penalty is asked for, the distance from the reference, (rows, 1 or 2)::

    loss = loss_scale * l(R) + reference_weight * mean over elements of (prediction - reference's prediction)^2

with both predictions made, without guidance, where the part with a gradient begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.batch import Condition, ImageBatch
from diffalign.diffusion.differentiable import sample_with_gradient
from diffalign.diffusion.guidance import Predictor, guided
from diffalign.diffusion.level import Grid
from diffalign.diffusion.random import derive_seed, randn_rows
from diffalign.errors import UserError, require_above, require_at_least, unknown
from diffalign.strategies.base import Context, LossOutput, Piece, Spec, Strategy, Terms
from diffalign.strategies.pair_kernel import squared_errors

RewardForm = Literal["linear", "distance", "hinge"]


def reward_loss(rewards: Tensor, form: RewardForm = "linear", target: float = 0.0) -> Tensor:
    """Loss of each image.

    Args:
        rewards: any shape, higher is better.
        form: "linear" ``target - R``; "distance" ``|R - target|``, which pulls back from above it; "hinge"
            ``max(target - R, 0)``, which leaves images above it alone.
        target: the reward that is aimed at; without effect on the gradient of "linear".

    Returns:
        the losses, shaped as ``rewards``.
    """
    gap = target - rewards
    if form == "linear":
        return gap
    if form == "distance":
        return gap.abs()
    if form == "hinge":
        return F.relu(gap)
    raise unknown("form of a reward loss", form, ("linear", "distance", "hinge"))


@dataclass(frozen=True)
class RewardGradientConfig:
    """Constants that all methods with a reward's gradient have.

    Args:
        rollout_steps: moves from noise to image while training. 50: official code of AlignProp.
        rollout_guidance_scale: guidance of those samples; 1 switches it off. 5: official code of AlignProp.
        eta: share of DDIM's randomness, 0 .. 1; flow models sample without any. 1: official code of AlignProp.
        detach_unconditional: take the unconditional branch of guidance for a constant. False: official code of
            AlignProp.
        loss_form: "linear" -R, "distance" |R - target|, or "hinge" max(target - R, 0). linear: the official HPS
            setting ("distance" in its aesthetic one).
        reward_target: the target of the other forms. 0: ours.
        loss_scale: factor on the loss, which acts through gradient clipping. 0.01: official code of AlignProp.
        reference_weight: weight of the squared distance of predictions from the reference's. 0: the papers stop early.
    """

    rollout_steps: int = 50
    rollout_guidance_scale: float = 5.0
    eta: float = 1.0
    detach_unconditional: bool = False
    loss_form: RewardForm = "linear"
    reward_target: float = 0.0
    loss_scale: float = 0.01
    reference_weight: float = 0.0

    def __post_init__(self) -> None:
        require_at_least(1, self, "rollout_steps")
        if not 0 <= self.eta <= 1:
            raise UserError(f"eta is {self.eta}: expected a number in [0, 1]")
        require_above(0, self, "loss_scale")
        require_at_least(0, self, "reference_weight")

    def objective(self, terms: Tensor, examples: int) -> LossOutput:
        """Return the mean loss over examples.

        Args:
            terms: (rows, 1 or 2) of a :class:`RewardKernel`, whole blocks of the examples.
            examples: B.
        """
        by_example = terms[:, 0].reshape(-1, examples)
        losses = self.loss_scale * reward_loss(by_example, self.loss_form, self.reward_target).mean(0)
        metrics = {"reward": by_example.detach().mean(0)}
        if self.reference_weight:
            distances = terms[:, 1].reshape(-1, examples).mean(0)
            losses = losses + self.reference_weight * distances
            metrics["reference_distance"] = distances.detach()
        return LossOutput(losses.mean(), {"loss": losses.detach(), **metrics})

    def fitted(self, spec: Spec) -> Spec:
        """Return what these options need of the run, and which guards this form of the loss trips by design."""
        spec = replace(spec, needs_reference=self.reference_weight > 0)
        if self.loss_form != "hinge":
            return spec
        reached = "images above the target have neither loss nor gradient"
        return replace(spec, waived_guards={**spec.waived_guards, "zero_loss": reached, "zero_gradient": reached})


class RewardGradient(Strategy):
    """What AlignProp, DRaFT and ReFL have in common; each has its constants and its kernel, a :class:`RewardKernel`."""

    spec = Spec(data="prompts", needs_reference=False, needs_reward="differentiable", lockstep="none")

    def __init__(self, config: RewardGradientConfig) -> None:
        super().__init__(config)
        self.spec = config.fitted(self.spec)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Return the mean over images."""
        return self.config.objective(terms.policy, batch.size)  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Departure:
    """Where the part of sampling with a gradient begins.

    Args:
        latents: (rows, channels, ...) there.
        step: index of the next move.
        seeds: (rows,) int64, of the noise of further moves.
        condition, prompts, metadata: of each row.
        live: for each further move, whether its prediction carries a gradient.
    """

    latents: Tensor
    step: int
    seeds: Tensor
    condition: Condition
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]] = ()
    live: Sequence[bool] = ()

    def select(self, rows: slice | None) -> Departure:
        """Return some rows; all of them for None."""
        if rows is None:
            return self
        return replace(
            self,
            latents=self.latents[rows],
            seeds=self.seeds[rows],
            condition=self.condition.select(rows),
            prompts=self.prompts[rows],
            metadata=self.metadata[rows],
        )


class RewardKernel(ABC):
    """Terms are rewards of images sampled with a gradient; see the module.

    Args:
        config: how images are sampled.
    """

    def __init__(self, config: RewardGradientConfig) -> None:
        self.config = config

    @abstractmethod
    def draw(self, ctx: Context, batch: ImageBatch) -> Departure:
        """Sample without a gradient up to where one begins."""

    @abstractmethod
    def arrive(self, ctx: Context, departure: Departure) -> Tensor:
        """Return clean latents (rows, channels, ...) with a graph."""

    def rows(self, draws: Departure) -> int:
        """Number of images."""
        return len(draws.latents)

    def frozen(self, ctx: Context, batch: ImageBatch, draws: Departure, piece: Piece) -> Mapping[str, Tensor]:
        """Nothing that is one number a row."""
        return {}

    def terms(self, ctx: Context, batch: ImageBatch, draws: Departure, piece: Piece) -> Tensor:
        """Rewards, and distances from the reference where they are penalised, (rows, 1 or 2) float32."""
        departure = draws.select(piece.rows)
        images = ctx.policy.decode(self.arrive(ctx, departure))
        scores = ctx.reward.score(images, departure.prompts, departure.metadata or None)
        columns = [scores.to(torch.promote_types(scores.dtype, torch.float32))]
        if self.config.reference_weight:
            columns.append(self._distance(ctx, departure))
        return torch.stack(columns, dim=1)

    def _distance(self, ctx: Context, departure: Departure) -> Tensor:
        """Mean squared distance of the policy's prediction from the reference's at the departure, (rows,)."""
        assert ctx.reference is not None
        timestep, _, _ = self.grid(ctx).to(ctx.device).move(departure.step)
        where = departure.latents, timestep.expand(len(departure.latents)), departure.condition
        with ctx.reference.active() as reference:
            frozen = reference.predict(*where)
        return squared_errors(ctx.policy.predict(*where), frozen)

    def grid(self, ctx: Context) -> Grid:
        """The sampler's moves."""
        return ctx.policy.process.sampling_grid(self.config.rollout_steps)

    def start(self, ctx: Context, batch: ImageBatch) -> Departure:
        """Return the noise that sampling starts from; each row becomes an image."""
        ctx.progress.images += batch.size
        noise = randn_rows(batch.seeds, batch.latents.shape[1:], "rollout-start", ctx.device).to(batch.latents.dtype)
        condition = batch.conditions[0]
        return Departure(
            noise * self.grid(ctx).noise_scale, 0, batch.seeds, condition, list(batch.prompts), list(batch.metadata)
        )

    def moved(self, ctx: Context, departure: Departure, live: Sequence[bool]) -> Tensor:
        """Make as many further moves as ``live`` has entries; returns latents (rows, channels, ...)."""
        shape, seeds = departure.latents.shape[1:], departure.seeds
        return sample_with_gradient(
            self.predictor(ctx, departure),
            ctx.policy.process,
            departure.latents,
            self.grid(ctx),
            live,
            first=departure.step,
            eta=self.config.eta,
            step_noise=lambda move: randn_rows(seeds, shape, f"rollout-{move}", ctx.device),
        )

    def predictor(self, ctx: Context, departure: Departure) -> Predictor:
        """The policy with guidance."""
        scale = self.config.rollout_guidance_scale
        null = ctx.policy.null_condition(len(departure.latents)) if scale != 1.0 else None
        detached = self.config.detach_unconditional
        return guided(ctx.policy.predict, departure.condition, null, scale, detach_null=detached)


class TailKernel(RewardKernel):
    """The sampler itself; the last moves carry a gradient as a plan says."""

    @abstractmethod
    def plan(self, ctx: Context) -> Sequence[bool]:
        """Return for each move whether its prediction carries a gradient."""

    def draw(self, ctx: Context, batch: ImageBatch) -> Departure:
        live = self.plan(ctx)
        constant = live.index(True)
        departure = self.start(ctx, batch)
        latents = self.moved(ctx, departure, live[:constant])
        return replace(departure, latents=latents, step=constant, live=live[constant:])

    def arrive(self, ctx: Context, departure: Departure) -> Tensor:
        return self.moved(ctx, departure, departure.live)


def jump(kernel: RewardKernel, ctx: Context, departure: Departure) -> Tensor:
    """Return the clean latents that one prediction at the departure stands for, (rows, channels, ...)."""
    timestep, source, _ = kernel.grid(ctx).to(ctx.device).move(departure.step)
    prediction = kernel.predictor(ctx, departure)(departure.latents, timestep.expand(len(departure.latents)))
    return ctx.policy.process.to_x0(prediction, departure.latents, source)


def update_generator(ctx: Context, stream: str) -> torch.Generator:
    """Return randomness that all images of an optimizer step share, on all processes, and after a resume."""
    return torch.Generator().manual_seed(derive_seed(ctx.seed, stream, ctx.step))
