"""What all processes know of a rollout's images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.rollouts.gather import gather_rows
from diffalign.strategies.base import Context


@dataclass(frozen=True)
class Judged:
    """What all processes know of the images of a rollout, the same on each, ordered by the images' seeds.

    Args:
        seeds: (n,) int64, one an image.
        groups: (n,) int64, equal for the images of one caption in this rollout.
        captions: (n,) int64, equal for images of equal captions, in any rollout.
        rewards: (n, R) float32, one column a reward; 0 where there is none.
        valid: (n,) bool, False where a reward failed.
        own: (rows,) int64, where this process's images are, in the order of its rows.
    """

    seeds: Tensor
    groups: Tensor
    captions: Tensor
    rewards: Tensor
    valid: Tensor
    own: Tensor


def exchange(ctx: Context, numbers: Tensor, rewards: Tensor) -> Judged:
    """Give every process what is known of the images of all.

    Args:
        ctx: the run.
        numbers: (rows, 4) int64 of this process's images: seed, group, caption, and whether the reward is valid.
        rewards: (rows, R).
    """
    every, own = gather_rows(numbers.to(ctx.device), ctx.rank, ctx.world_size, ctx.reduce)
    scores, _ = gather_rows(rewards.to(ctx.device), ctx.rank, ctx.world_size, ctx.reduce)
    every, scores = every.cpu(), scores.cpu()
    order = every[:, 0].argsort()
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order))
    seeds, groups, captions, valid = every[order].unbind(1)
    return Judged(seeds, groups, captions, scores[order], valid.bool(), place[own])
