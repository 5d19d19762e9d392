"""Sampling images from the policy while recording all that replaying a step under other weights takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.batch import Condition
from diffalign.diffusion.guidance import Predictor, guided
from diffalign.diffusion.random import derive_seed, randn_rows
from diffalign.policies.base import Policy
from diffalign.rollouts.steps import StochasticSteps


@dataclass(frozen=True)
class Storage:
    """How latents of trajectories are kept.

    Args:
        dtype: their type. The sampler continues from latents rounded to it, so that what is replayed is what happened.
        device: where they wait; None leaves them where they were sampled.
        means: keep the means of all transitions too, for ratios that are normalised by them.
    """

    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    means: bool = False


@dataclass(frozen=True)
class Trajectories:
    """Sampled images with the way to them.

    Args:
        latents: (rows, T + 1, channels, ...) before the first step, then after each; as :class:`Storage` says.
        log_probs: (rows, T) float32, of each step when it was drawn.
        condition: (rows) the captions.
        seeds: (rows,) int64, of each image.
        guidance_scale: with which they were sampled, and must be replayed.
        means: (rows, T, channels, ...) of the transitions, where :class:`Storage` asks for them.
    """

    latents: Tensor
    log_probs: Tensor
    condition: Condition
    seeds: Tensor
    guidance_scale: float = 1.0
    means: Tensor | None = None

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def final(self) -> Tensor:
        """(rows, channels, ...) latents of the images, float32, on the device of the log-probabilities."""
        return self.latents[:, -1].to(self.log_probs)

    def select(self, rows: Tensor | slice) -> Trajectories:
        """Return the given rows."""
        kept = rows.to(self.latents.device) if isinstance(rows, Tensor) else rows
        return Trajectories(
            self.latents[kept],
            self.log_probs[rows],
            self.condition.select(rows),
            self.seeds[rows.cpu() if isinstance(rows, Tensor) else rows],
            self.guidance_scale,
            None if self.means is None else self.means[kept],
        )

    @staticmethod
    def cat(parts: Sequence[Trajectories]) -> Trajectories:
        """Join trajectories of one sampler row-wise."""
        means = [part.means for part in parts if part.means is not None]
        return Trajectories(
            torch.cat([part.latents for part in parts]),
            torch.cat([part.log_probs for part in parts]),
            Condition.cat([part.condition for part in parts]),
            torch.cat([part.seeds for part in parts]),
            parts[0].guidance_scale,
            torch.cat(means) if means else None,
        )


def image_seeds(seeds: Tensor, images: int) -> Tensor:
    """Return a seed for each of the images of each example, (images * B,) in block order.

    Args:
        seeds: (B,) int64, of the examples.
        images: images an example has.
    """
    rows = [derive_seed(seed, "image", image) for image in range(images) for seed in seeds.tolist()]
    return torch.tensor(rows, dtype=torch.long)


@torch.no_grad()
def roll_out(
    policy: Policy,
    steps: StochasticSteps,
    condition: Condition,
    seeds: Tensor,
    shape: tuple[int, ...],
    *,
    guidance_scale: float = 1.0,
    start_seeds: Tensor | None = None,
    storage: Storage | None = None,
) -> Trajectories:
    """Sample one image a row.

    Args:
        policy: samples, in eval mode.
        steps: the sampler.
        condition: (rows) the captions.
        seeds: (rows,) int64; the noise of an image depends on nothing else.
        shape: (channels, ...) of one image's latents.
        guidance_scale: 1 is the conditional model alone.
        start_seeds: (rows,) int64 of the initial noise where images share it (D3PO, DanceGRPO); ``seeds`` by default.
        storage: how latents are kept; float32 in place by default.
    """
    storage, device = storage or Storage(), policy.device
    rows = len(seeds)
    start = randn_rows(seeds if start_seeds is None else start_seeds, shape, "rollout-start", device)
    latents = (start * steps.noise_scale).to(storage.dtype).float()
    kept, log_probs, means = [latents], [], []
    with policy.inference():
        predict = guided_prediction(policy, condition, guidance_scale)
        for step in range(len(steps)):
            transition = steps.transition(step, predict(latents, steps.timesteps(step, rows, device)), latents)
            drawn = transition.sample(randn_rows(seeds, shape, f"rollout-{step}", device))
            latents = drawn.to(storage.dtype).float()
            kept.append(latents)
            log_probs.append(transition.log_prob(latents).float())
            if storage.means:
                means.append(transition.mean.to(storage.device or device, torch.float32))
    stored = torch.stack([value.to(storage.device or device, storage.dtype) for value in kept], dim=1)
    return Trajectories(
        stored,
        torch.stack(log_probs, dim=1),
        condition,
        seeds,
        guidance_scale,
        torch.stack(means, dim=1) if storage.means else None,
    )


def replay(policy: Policy, steps: StochasticSteps, trajectories: Trajectories, step: int) -> Tensor:
    """Return the log-probability of a recorded step under the policy as it is now, (rows,), with a graph if recorded.

    Args:
        policy: another state of the one that sampled, or a reference.
        steps: the sampler that was sampled with.
        trajectories: what happened.
        step: index of the move.
    """
    device = trajectories.log_probs.device
    before, after = (trajectories.latents[:, index].to(device).float() for index in (step, step + 1))
    predict = guided_prediction(policy, trajectories.condition, trajectories.guidance_scale)
    prediction = predict(before, steps.timesteps(step, len(trajectories), device))
    return steps.transition(step, prediction, before).log_prob(after).float()


def guided_prediction(
    policy: Policy, condition: Condition, guidance_scale: float, detach_null: bool = False
) -> Predictor:
    """Close a policy over captions and guidance, the same way in sampling and replay.

    Args:
        policy: the policy.
        condition: (rows) the captions.
        guidance_scale: 1 is the conditional model alone.
        detach_null: no gradient through the unconditional branch.
    """
    null = policy.null_condition(len(condition)) if guidance_scale != 1.0 else None
    return guided(policy.predict, condition, null, guidance_scale, detach_null)
