"""A training that is given its own samples' latents back sees exactly those."""

from __future__ import annotations

import torch

from benchmarks.imitation import as_they_were
from diffalign.inference.generate import decode_images, generate_latents
from diffalign.policies.codec import LatentCodec
from tests.factories import tiny_policy


def test_pictures_are_known_by_their_pixels() -> None:
    policy = tiny_policy("sd")
    latents = generate_latents(policy, ["a", "b", "c"], [0, 1, 2], num_steps=2, guidance_scale=1.0)
    images = decode_images(policy, latents)
    pixels = images[[2, 0]] * 2 - 1
    codec = LatentCodec(policy.codec._vae, policy.codec.downsampling)
    assert torch.equal(as_they_were(images, latents)(codec, pixels), latents[[2, 0]])
    assert not torch.allclose(codec.encode(pixels), latents[[2, 0]], atol=1e-3)
