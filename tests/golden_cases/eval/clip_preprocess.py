"""CLIP's image processor: the exact pipeline against the numbers, the tensor pipeline against both."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image

from diffalign.rewards.preprocess import ClipPreprocess, to_tensor
from tests.golden_cases.base import GoldenCase, compare


def run(case: GoldenCase) -> dict[str, Any]:
    sizes = {"shortest_edge": None, "crop": None, "mean": None, "std": None}
    case.known({"image_hwc_uint8"}, {**sizes, "resample": {"bicubic"}})
    settings = case.params
    assert settings["shortest_edge"] == settings["crop"]
    preprocess = ClipPreprocess(settings["crop"], settings["mean"], settings["std"])
    picture = Image.fromarray(np.array(case.inputs["image_hwc_uint8"], dtype=np.uint8))
    exact = preprocess.exact([picture])[0]
    by_tensors = preprocess(to_tensor(picture)[None].to(torch.float64))[0]
    compare(by_tensors, case.expected["pixel_values_chw"], case.tolerance, "tensor pipeline")
    return {"pixel_values_chw": exact}
