"""Figures of samples against numbers made by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from diffalign.evaluation.drift import Samples, appearance, drift


def test_distances_are_root_mean_squares_of_each_sample(tmp_path: Path) -> None:
    start = Samples(torch.zeros(2, 4, 2, 2), torch.zeros(2, 3, 8, 8))
    latents, images = torch.zeros(2, 4, 2, 2), torch.zeros(2, 3, 8, 8)
    latents[0], images[1] = 3.0, 0.5
    assert drift(start, start) == {"drift/latent": 0.0, "drift/pixel": 0.0}
    assert drift(start, Samples(latents, images)) == {"drift/latent": 1.5, "drift/pixel": 0.25}
    latents[0] = 0.0
    latents[0, 0, 0, 0] = 4.0  # one of 16 elements
    assert drift(start, Samples(latents, images))["drift/latent"] == pytest.approx(0.5)


def test_the_start_survives_its_file(tmp_path: Path) -> None:
    images = (torch.rand(2, 3, 8, 8) * 255).round() / 255
    samples = Samples(torch.randn(2, 4, 2, 2), images)
    samples.save(tmp_path / "deep" / "start.safetensors")
    back = Samples.load(tmp_path / "deep" / "start.safetensors")
    assert torch.equal(back.latents, samples.latents)
    torch.testing.assert_close(back.images, images, rtol=0, atol=1e-7)
    assert drift(samples, back)["drift/pixel"] < 1e-7


def test_grey_has_no_colour_and_one_colour_its_distance_from_grey() -> None:
    assert appearance(torch.full((1, 3, 8, 8), 0.5)) == {"samples/colourfulness": 0.0}
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 1.0
    # no spread; the mean of red - green is 255, of yellow - blue 127.5
    assert appearance(red)["samples/colourfulness"] == pytest.approx(0.3 * (255**2 + 127.5**2) ** 0.5, rel=1e-5)
    half = red.clone()
    half[..., :4] = 0.0
    spread = (127.5**2 + 63.75**2) ** 0.5
    assert appearance(half)["samples/colourfulness"] == pytest.approx(1.3 * spread, rel=1e-5)


def test_diversity_vanishes_where_all_samples_are_one() -> None:
    image = torch.rand(1, 3, 8, 8)
    assert appearance(image.repeat(4, 1, 1, 1))["samples/diversity"] == 0.0
    pair = torch.stack([torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    assert appearance(pair)["samples/diversity"] == pytest.approx(1.0)
