"""SePPO: winners against images of an earlier checkpoint, which count as losers only where the policy leads.

Paper: Zhang et al., "SePPO: Semi-Policy Preference Optimization for Diffusion Alignment", arXiv 2410.05255. The
official repository (https://github.com/DwanZhang-AI/SePPO) holds no training code; this follows the formulas.

A run keeps its own checkpoints, the start among them. In each stage (or at each update) one of them is drawn: it
samples an image (r) for the caption of every winner (w), and it is the reference. One timestep for both images, noise
of its own for each::

    d_w  = ref_err_w - err_w         d_r = ref_err_r - err_r
    s    = sign(d_w), no gradient    +1: r is a loser, -1: r is another winner
    loss = mean over winners of -log sigmoid(0.5 beta (d_w - s d_r))

A sampled image that counts as a loser may have its gradient scaled or bounded, as in every method on pairs.
The loss starts at log 2. Errors are means over elements, and beta is that of Diffusion-DPO's code, since the paper's
constants are unknown. The same formula serves epsilon, v and flow. Only adapters can be kept (``--train_mode lora``),
and all of them are: in main memory and in the run's checkpoints.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from diffalign.batch import Batch, Condition, ImageBatch
from diffalign.diffusion.guidance import guided
from diffalign.diffusion.random import derive_seed, randn_rows
from diffalign.diffusion.sampling import sample
from diffalign.errors import require_at_least, unknown
from diffalign.policies.pool import PAST_ADAPTER, AdapterPool
from diffalign.references import NamedAdapter
from diffalign.strategies.base import Context, Kernel, LossOutput, Piece, Spec, Terms, Update
from diffalign.strategies.heads import scale_gradient
from diffalign.strategies.pair_kernel import DenoisingKernel, Noised, own_noise
from diffalign.strategies.pair_loss import PairConfig, PairErrors, PairObjective, PairStrategy
from diffalign.strategies.registry import register

Flip = Literal["sign", "indicator", "none"]


def anchor_sign(d_w: Tensor, flip: Flip = "sign", tolerance: float = 0.0) -> Tensor:
    """Return how the sampled image counts, (B,), without a gradient.

    Args:
        d_w: (B,) by how much the policy denoises the winner better than the reference.
        flip: "sign" (paper): another winner where the policy lags; "indicator": ignored there; "none": always a loser.
        tolerance: differences no larger count as 0, for rounding at the start where policy equals reference.

    Raises:
        UserError: for another ``flip``.
    """
    if flip not in get_args(Flip):
        raise unknown("flip", flip, get_args(Flip))
    d_w = d_w.detach()
    if flip == "none":
        return torch.ones_like(d_w)
    sign = torch.where(d_w.abs() <= tolerance, torch.zeros_like(d_w), d_w.sign())
    return sign.clamp(min=0) if flip == "indicator" else sign


def anchored_margin(errors: PairErrors, sign: Tensor, loser_scale: float | Tensor = 1.0) -> Tensor:
    """Return ``d_w - s d_r``, (B,), the sampled images standing in place of the rejected ones.

    Args:
        errors: of winners and sampled images.
        sign: (B,) of :func:`anchor_sign`.
        loser_scale: factor on the gradient through sampled images that count as losers, one or (B,).
    """
    scale = torch.where(sign > 0, loser_scale, 1.0)
    return errors.d_w - sign * scale_gradient(errors.d_l, scale)


@dataclass(frozen=True)
class SePPOConfig(PairConfig):
    """Constants of SePPO.

    Args:
        beta: inverse temperature, in Diffusion-DPO's convention. 2000: that method's on SD 1.5; the paper's is unknown.
        flip: how the sampled image counts where the policy lags behind its reference on the winner: as another winner
            ("sign", paper), not at all ("indicator", the paper's ablation), or as a loser there too ("none").
        sign_tolerance: differences of errors no larger have no sign. 1e-6: above the rounding of float32.
        checkpoint_steps: optimizer steps of a stage, which ends with a new checkpoint. 30: paper.
        reference_draw: which checkpoint a stage refers to: any of them alike ("random", paper), the start ("initial",
            as DITTO) or the newest ("latest", as SPIN-Diffusion).
        reference_redrawn: how often that is drawn, once a "stage" or at every "update". stage: ours, the paper does not
            say.
        rollout_steps: denoising steps of a sampled image. 20: ours, the paper's number is unknown.
        rollout_guidance_scale: guidance of a sampled image; 1 switches it off. 7.5: Stable Diffusion's, the paper's
            is unknown.
    """

    beta: float = 2000.0
    flip: Flip = "sign"
    sign_tolerance: float = 1e-6
    checkpoint_steps: int = 30
    reference_draw: Literal["random", "initial", "latest"] = "random"
    reference_redrawn: Literal["stage", "update"] = "stage"
    rollout_steps: int = 20
    rollout_guidance_scale: float = 7.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(1, self, "checkpoint_steps", "rollout_steps")


@register(
    "seppo",
    summary="winners against images of an earlier checkpoint, which count as losers only where the policy leads",
    paper="SePPO: Semi-Policy Preference Optimization for Diffusion Alignment (arXiv 2410.05255)",
    repository="https://github.com/DwanZhang-AI/SePPO",
    family="self-play",
)
class SePPO(PairStrategy):
    """Learns from winners and from its own past."""

    spec = Spec(data="winners", needs_reference=False, moving_reference=True, lockstep="none")
    Config = SePPOConfig
    glossary: ClassVar[Mapping[str, str]] = {
        "anchor_sign": "how the image of the policy's own past counts: +1 as rejected, -1 as chosen too, 0 not at all",
    }

    def __init__(self, config: SePPOConfig) -> None:
        super().__init__(config)
        self.objective = PairObjective(config)
        self.pool = AdapterPool()

    def kernel(self) -> Kernel:
        """One timestep an example, noise of its own for each image."""
        return DenoisingKernel.drawing(self.config, own_noise)

    def build(self, ctx: Context) -> None:
        """Make the start the first checkpoint."""
        self.pool.build(ctx.policy.adapters)

    def collect(self, ctx: Context, batches: Sequence[Batch]) -> list[Update]:
        """End a stage where one is over, and load the checkpoint of the present one; every process does the same."""
        stage = ctx.step // self.config.checkpoint_steps
        while len(self.pool) <= stage:
            self.pool.add()
        self.pool.load(self._drawn(ctx.seed, ctx.step))
        return [Update(batches)]

    def draw(self, ctx: Context, batch: ImageBatch) -> Noised:
        """Sample an image beside every winner, then noise both."""
        with self.pool.using():
            sampled = self._sample(ctx, batch.condition, batch.seeds, batch.latents.shape[1:])
        pairs = replace(batch, latents=torch.cat([batch.latents, sampled]), conditions=batch.conditions * 2)
        return super().draw(ctx, pairs)

    def frozen(self, ctx: Context, batch: ImageBatch, draws: Noised, piece: Piece) -> Mapping[str, Tensor]:
        """Errors of the checkpoint that sampled."""
        past = replace(ctx, reference=NamedAdapter(ctx.policy, PAST_ADAPTER))
        return self._kernel.frozen(past, batch, draws, piece)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Return the mean over winners."""
        errors = PairErrors.of(terms)
        sign = anchor_sign(errors.d_w, self.config.flip, self.config.sign_tolerance)
        scale = self.config.rejected_scale(errors.err_w, errors.err_l)
        output = self.objective.from_margin(anchored_margin(errors, sign, scale), errors.err_w)
        return LossOutput(output.loss, {**output.metrics, **errors.metrics(), "anchor_sign": sign})

    def state_dict(self) -> dict[str, Any]:
        """The checkpoints so far; which one a stage refers to follows from the run's seed."""
        return self.pool.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the checkpoints."""
        self.pool.load_state_dict(state)

    def _drawn(self, seed: int, step: int) -> int:
        """Index of the checkpoint that an optimizer step refers to, of those made before its stage."""
        stage = step // self.config.checkpoint_steps
        if self.config.reference_draw == "random":
            draw = step if self.config.reference_redrawn == "update" else stage
            return derive_seed(seed, "checkpoint", draw) % (stage + 1)
        return 0 if self.config.reference_draw == "initial" else stage

    def _sample(self, ctx: Context, condition: Condition, seeds: Tensor, shape: Sequence[int]) -> Tensor:
        """Clean latents (rows, *shape) under the adapter that is active."""
        policy, scale = ctx.policy, self.config.rollout_guidance_scale
        ctx.progress.images += len(seeds)
        null = policy.null_condition(len(seeds)) if scale != 1 else None
        predict = guided(policy.predict, condition, null, scale)
        noise = randn_rows(seeds, shape, "own-image", ctx.device)
        return sample(predict, policy.process, noise, self.config.rollout_steps)
