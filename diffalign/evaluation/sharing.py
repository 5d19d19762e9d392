"""Sampling that the processes of a run share out among themselves."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.data.team import Team
from diffalign.inference.generate import generate_latents
from diffalign.policies.base import Policy


def latents_together(
    policy: Policy,
    prompts: Sequence[str],
    seeds: Sequence[int],
    team: Team,
    *,
    num_steps: int,
    guidance_scale: float,
    resolution: tuple[int, int] | None = None,
    batch_size: int = 32,
) -> Tensor:
    """Sample the latents of one image for each caption; every process samples its share, and is given all of them.

    An image depends on nothing but its caption and seed; several processes sample smaller batches than one, though,
    which changes the last bits of what a network computes.

    Args:
        policy: the model, the same in all processes.
        prompts, seeds, num_steps, guidance_scale, resolution, batch_size: as of
            :func:`diffalign.inference.generate.generate_latents`.
        team: the processes; all call this together.

    Returns:
        (n, channels, ...), in the order of the captions.

    Raises:
        UserError: on every process where one of them fails.
    """
    places = list(range(len(prompts)))
    shares = [places[rank :: team.world_size] for rank in range(team.world_size)]
    own = shares[team.rank]

    def sample() -> Tensor | None:
        if not own:
            return None
        latents = generate_latents(
            policy,
            [prompts[place] for place in own],
            [seeds[place] for place in own],
            num_steps=num_steps,
            guidance_scale=guidance_scale,
            resolution=resolution,
            batch_size=batch_size,
        )
        return latents if team.world_size == 1 else latents.cpu()  # others get it by way of main memory

    parts = [part for part in team.together(sample) if part is not None]
    order = torch.tensor([place for share in shares for place in share]).argsort()
    joined = torch.cat(parts).to(policy.device)
    return joined[order.to(joined.device)]
