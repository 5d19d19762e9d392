"""Framing: decided by the example's seed alone, exact at the borders, one bucket for all images of an example."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from diffalign.data.transforms import (
    Framing,
    aspect_buckets,
    assign_bucket,
    centred,
    draw_framing,
    place,
    to_pixels,
)
from tests.data.support import picture


def test_pixels_of_an_image_of_the_training_size_are_only_rescaled():
    image = picture(0)
    pixels = centred(to_pixels(image, place((12, 12), (12, 12), Framing()), (12, 12)))
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).double() / 127.5 - 1
    torch.testing.assert_close(pixels.double(), expected, rtol=0, atol=1e-6)
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_flip_mirrors_the_crop():
    image = picture(1, 12, 20)
    placement = place((12, 20), (12, 12), Framing(across=0.25))
    mirrored = place((12, 20), (12, 12), Framing(across=0.25, flip=True))
    assert placement.left == 2
    assert torch.equal(to_pixels(image, placement, (12, 12)).flip(2), to_pixels(image, mirrored, (12, 12)))


@given(
    height=st.integers(1, 300),
    width=st.integers(1, 300),
    target=st.tuples(st.sampled_from([8, 16, 40, 64]), st.sampled_from([8, 16, 40, 64])),
    across=st.floats(0, 1),
    down=st.floats(0, 1),
)
def test_the_crop_lies_inside_the_resized_image_and_wastes_only_one_direction(height, width, target, across, down):
    placement = place((height, width), target, Framing(across, down))
    assert 0 <= placement.top <= placement.height - target[0]
    assert 0 <= placement.left <= placement.width - target[1]
    assert placement.height == target[0] or placement.width == target[1]


def test_framing_is_a_function_of_the_seed():
    framings = [draw_framing(seed, center_crop=False, random_flip=True) for seed in range(200)]
    assert framings == [draw_framing(seed, center_crop=False, random_flip=True) for seed in range(200)]
    assert 70 < sum(framing.flip for framing in framings) < 130
    assert len({framing.across for framing in framings}) == 200
    assert draw_framing(3) == Framing(0.5, 0.5, False)
    assert draw_framing(3, center_crop=True, random_flip=True).flip == framings[3].flip


@pytest.mark.parametrize("resolution", [(64, 64), (512, 512), (1024, 1024), (768, 512)])
def test_buckets_share_the_area_and_keep_to_the_ratio(resolution):
    buckets = aspect_buckets(resolution)
    step = max(8, min(resolution) // 16 // 8 * 8)
    assert resolution in buckets
    assert len(set(buckets)) == len(buckets) > 4
    for height, width in buckets:
        assert height % step == width % step == 0
        assert max(height / width, width / height) <= 2.0
        assert 0.75 < height * width / (resolution[0] * resolution[1]) <= 1.0


def test_the_bucket_is_the_nearest_shape_and_shared_by_the_images_of_an_example():
    buckets = [(512, 1024), (768, 768), (1024, 512)]
    assert assign_bucket([(100, 190)], buckets) == (512, 1024)
    assert assign_bucket([(100, 110)], buckets) == (768, 768)
    assert assign_bucket([(200, 100), (100, 200)], buckets) == (768, 768)


def test_enlarging_and_shrinking_keep_a_plain_colour():
    for size in (4, 50):
        image = Image.new("RGB", (size, size), (255, 0, 51))
        pixels = centred(to_pixels(image, place((size, size), (8, 8), Framing()), (8, 8)))
        torch.testing.assert_close(pixels, torch.tensor([1.0, -1.0, -0.6])[:, None, None].expand(3, 8, 8))
