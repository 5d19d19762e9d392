"""Figures of samples against numbers made by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffalign.evaluation.drift import Probe, Samples, Start, appearance
from tests.factories import ToyPolicy

PROBE = Probe(("a cat", "a dog"), num_steps=2, guidance_scale=1.0)


def start_of(policy: ToyPolicy) -> Start:
    return Start.of(policy, PROBE, PROBE.sample(policy))


@pytest.mark.parametrize("process", ["epsilon", "v_prediction", "flow"])
def test_a_model_that_stands_still_has_not_drifted(process: str) -> None:
    policy = ToyPolicy(process)
    start = start_of(policy)
    assert set(start.drift(policy, PROBE.sample(policy)).values()) == {0.0}
    policy.module.delta["default"].data.fill_(0.1)
    moved = start.drift(policy, PROBE.sample(policy))
    assert all(value > 0 for value in moved.values())
    assert moved.keys() == {"drift/latent", "drift/pixel", "drift/prediction"}


def test_distances_are_root_mean_squares_of_each_sample() -> None:
    policy = ToyPolicy()
    start = replace(start_of(policy), samples=Samples(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 8, 8)))
    latents, images = torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 8, 8)
    latents[0], images[1] = 3.0, 0.5
    start = Start.of(policy, PROBE, start.samples)
    figures = start.drift(policy, Samples(latents, images))
    assert figures == {"drift/latent": 1.5, "drift/pixel": 0.25, "drift/prediction": 0.0}
    latents[0] = 0.0
    latents[0, 0, 0, 0] = 3.0  # one of 12 elements
    assert start.drift(policy, Samples(latents, images))["drift/latent"] == pytest.approx(1.5 / 12**0.5)


def test_predictions_are_compared_at_the_samples_of_the_start() -> None:
    policy = ToyPolicy()
    start = start_of(policy)
    policy.module.delta["default"].data.copy_(torch.tensor([0.2, 0.0]))  # adds 0.2 x to every prediction
    noisy = PROBE.predict(ToyPolicy(weight=(1.0, 0.0)), start.samples.latents)
    expected = (0.2 * noisy).square().mean().item()
    assert start.drift(policy, start.samples)["drift/prediction"] == pytest.approx(expected, rel=1e-5)


def test_the_start_survives_its_file_and_belongs_to_its_captions(tmp_path: Path) -> None:
    policy, path = ToyPolicy(), tmp_path / "deep" / "start.safetensors"
    assert Start.load(path, PROBE) is None
    start_of(policy).save(path)
    back = Start.load(path, PROBE)
    assert back is not None
    assert back.drift(policy, PROBE.sample(policy)) == pytest.approx(
        dict.fromkeys(("drift/latent", "drift/pixel", "drift/prediction"), 0.0), abs=1e-7
    )
    assert Start.load(path, replace(PROBE, prompts=("a cat", "a cow"))) is None
    assert Start.load(path, replace(PROBE, guidance_scale=2.0)) is None
    assert Start.load(path, replace(PROBE, resolution=(8, 8))) is None


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
