"""Diffusion-DRO: a denoising hinge between expert images and the policy's own samples.

Paper: Wu et al., "Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback", NeurIPS
2025, arXiv 2510.18353. Official code: https://github.com/basiclab/DiffusionDRO.

Expert images (w) are noised afresh. Beside each stands a latent (l) at the same timestep that the policy met while
sampling the caption from pure noise without guidance; its target is what the policy predicted there. With errors as
means over elements and the margin made for means::

    loss = mean over examples of max((err_w - ref_err_w) - (err_l - ref_err_l) + margin, 0)

The reference only decides which examples are active. While the sampler is the policy itself (``sampler_steps`` 1, as
published), err_l is 0 but for rounding, and the loss is fine-tuning on the experts, each until its gain over the
reference exceeds the policy's drift from it and the margin. The same formula serves epsilon, v and flow, with the
network's own output as the target.

Departures: DDIM or Euler in place of DPM-Solver++; a trajectory ends at the timestep that is asked of it, since
nothing reads what comes after; trajectories are not kept for a second use, as a larger buffer would: samples of an
older policy are what ``sampler_steps`` above 1 gives. The paper trains on the 500 winners that a reward prefers, drops
a fifth of the captions and exports a moving average: ``--caption_dropout 0.2 --use_ema true``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.batch import Batch, Condition, ImageBatch
from diffalign.diffusion.random import rand_rows, randn_rows
from diffalign.errors import UserError, require_at_least
from diffalign.policies.pool import AdapterPool
from diffalign.strategies.base import Context, Kernel, LossOutput, Spec, Strategy, Terms, Update
from diffalign.strategies.pair_kernel import DenoisingKernel, Noised, noised_at
from diffalign.strategies.pair_loss import PairErrors
from diffalign.strategies.registry import register


def ranking_hinge(errors: PairErrors, margin: float = 0.001) -> LossOutput:
    """Return the mean hinge over examples.

    Args:
        errors: of expert images (chosen) and of the policy's own samples (rejected).
        margin: 0.001: official code.
    """
    gap: Tensor = errors.d_l - errors.d_w
    losses = torch.maximum(gap + margin, torch.zeros_like(gap))
    active = (losses.detach() > 0).to(losses.dtype)
    metrics = {"loss": losses.detach(), "expert_gap": gap.detach(), "active_share": active}
    return LossOutput(losses.mean(), {**metrics, **errors.metrics()})


@dataclass(frozen=True)
class DROConfig:
    """Constants of Diffusion-DRO.

    Args:
        margin: of the hinge, for errors averaged over elements. 0.001: official code.
        rollout_steps: denoising steps of a trajectory. 20: official code.
        sampler_steps: optimizer steps after which the sampler takes the policy's weights again; more than 1 pushes away
            from what an older policy did, and needs --train_mode lora. 1: official code.
    """

    margin: float = 0.001
    rollout_steps: int = 20
    sampler_steps: int = 1

    def __post_init__(self) -> None:
        require_at_least(1, self, "rollout_steps", "sampler_steps")


@register(
    "dro",
    summary="expert images against the policy's own trajectories, with a hinge on denoising errors",
    paper="Ranking-based Preference Optimization for Diffusion Models from Implicit User Feedback (arXiv 2510.18353)",
    repository="https://github.com/basiclab/DiffusionDRO",
    family="self-play",
)
class DRO(Strategy):
    """Learns from experts and from its own trajectories."""

    spec = Spec(
        data="winners",
        moving_reference=True,
        lockstep="none",
        waived_guards=dict.fromkeys(("zero_loss", "zero_gradient"), "no expert of a batch may be left to learn from"),
    )
    Config = DROConfig
    glossary: ClassVar[Mapping[str, str]] = {
        "expert_gap": "gain on the policy's own sample minus that on the expert image",
        "active_share": "share of examples that still pull",
    }

    def __init__(self, config: DROConfig) -> None:
        super().__init__(config)
        self.pool = AdapterPool(size=1)
        self._sampler_age = 0

    def kernel(self) -> Kernel:
        """Errors where :meth:`draw` says."""
        return DenoisingKernel()

    def build(self, ctx: Context) -> None:
        """Make the sampler, unless it is the policy."""
        if self.config.sampler_steps > 1:
            self.pool.build(ctx.policy.adapters)

    def collect(self, ctx: Context, batches: Sequence[Batch]) -> list[Update]:
        """Refresh the sampler where that is due; every process does the same."""
        if self.config.sampler_steps > 1:
            age = ctx.step // self.config.sampler_steps
            if age != self._sampler_age:
                self.pool.add()
                self._sampler_age = age
            self.pool.load(0)
        return [Update(batches)]

    def draw(self, ctx: Context, batch: ImageBatch) -> Noised:
        """Walk a trajectory for every expert, then noise the expert to the timestep where it ended."""
        with self.pool.using() if self.config.sampler_steps > 1 else nullcontext():
            met = own_trajectory(ctx, batch.condition, batch.seeds, batch.latents.shape[1:], self.config.rollout_steps)
        noise = randn_rows(batch.seeds, batch.latents.shape[1:], "noise", ctx.device)
        expert = noised_at(ctx, batch, met.timesteps, noise)
        return Noised(
            torch.cat([expert.latents, met.latents]),
            met.timesteps.repeat(2),
            torch.cat([expert.target, met.target]),
            Condition.cat([batch.condition, batch.condition]),
        )

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """See :func:`ranking_hinge`."""
        return ranking_hinge(PairErrors.of(terms), self.config.margin)

    def state_dict(self) -> dict[str, Any]:
        """The sampler where it is not the policy, and when it was refreshed."""
        return {"pool": self.pool.state_dict(), "sampler_age": self._sampler_age}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if set(state) != {"pool", "sampler_age"}:
            raise UserError(f"the checkpoint holds {sorted(state)} in place of a sampler")
        self.pool.load_state_dict(state["pool"])
        self._sampler_age = state["sampler_age"]


def own_trajectory(ctx: Context, condition: Condition, seeds: Tensor, shape: Sequence[int], num_steps: int) -> Noised:
    """Sample each caption up to a step of its own, and return the latents met there with what was predicted for them.

    Each row has its own grid: ``num_steps`` indices of training timesteps at equal distance, all shifted by one random
    number, so that every timestep is met.

    Args:
        ctx: gives the policy, under whatever adapter is active.
        condition: (rows) the captions.
        seeds: (rows,) int64.
        shape: (channels, ...) of one image's latents.
        num_steps: steps of a whole trajectory.

    Raises:
        UserError: if there are more steps than training timesteps.
    """
    policy, process, device = ctx.policy, ctx.policy.process, ctx.device
    stride = process.num_train_timesteps // num_steps
    if not stride:
        raise UserError(f"rollout_steps is {num_steps}: expected {process.num_train_timesteps} at most")
    ctx.progress.images += len(seeds)
    last = (rand_rows(seeds, "trajectory-step", device) * num_steps).long()
    offset = (rand_rows(seeds, "trajectory-offset", device) * stride).long()
    descending = torch.arange(num_steps - 1, -1, -1, device=device)[:, None]
    timesteps = process.timestep_at(descending * stride + offset)  # (num_steps, rows)
    latents = randn_rows(seeds, shape, "trajectory-start", device)
    target = torch.empty_like(latents)
    for step in range(num_steps):
        rows = (last >= step).nonzero()[:, 0]
        if not len(rows):
            break
        here, following = timesteps[step, rows], timesteps[min(step + 1, num_steps - 1), rows]
        prediction = policy.predict(latents[rows], here, condition.select(rows))
        target[rows] = prediction.to(target)  # the last one stays
        moved = process.move(prediction, latents[rows], process.level(here), process.level(following), clip=True)
        going = last[rows] > step
        latents[rows[going]] = moved[going].to(latents)
    ended = timesteps[last, torch.arange(len(seeds), device=device)]
    return Noised(latents, ended, target, condition)
