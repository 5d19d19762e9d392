"""A step that carries a gradient keeps its latents and next to nothing else: exact counts, no timings."""

from __future__ import annotations

from itertools import pairwise

import pytest

from benchmarks.backprop_memory import measure
from tests.factories import Ripples, tiny_policy

SCALARS = 256
"""Bytes a step for its factors."""


@pytest.mark.parametrize("family", ["sd", "sd3"])
def test_memory_grows_by_one_latent_a_step(family: str) -> None:
    policy = tiny_policy(family, lora=True)
    kept = [measure(policy, Ripples(), steps, images=4) for steps in (1, 3, 9)]
    for fewer, more in pairwise(kept):
        added = more.steps - fewer.steps
        assert more.checkpointed - fewer.checkpointed <= added * (more.latents + SCALARS)
        # without it, every step keeps the activations of the network
        assert more.plain - fewer.plain > 20 * added * more.latents
