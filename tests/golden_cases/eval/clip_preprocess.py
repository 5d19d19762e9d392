"""CLIP's image processor."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from diffalign.rewards.preprocess import ClipPreprocess
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    sizes = {"shortest_edge": None, "crop": None, "mean": None, "std": None}
    case.known({"image_hwc_uint8"}, {**sizes, "resample": {"bicubic"}})
    settings = case.params
    preprocess = ClipPreprocess(settings["crop"], settings["mean"], settings["std"], settings["shortest_edge"])
    picture = Image.fromarray(np.array(case.inputs["image_hwc_uint8"], dtype=np.uint8))
    return {"pixel_values_chw": preprocess.exact([picture])[0]}
