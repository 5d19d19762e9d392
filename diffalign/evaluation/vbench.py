"""VBench (Huang et al., arXiv 2311.17982; Vchitect/VBench, Apache-2.0): totals of its sixteen dimensions, and the
arithmetic of its dynamic degree on given optical flow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from diffalign.errors import unknown

QUALITY_WEIGHTS = {
    "subject consistency": 1.0,
    "background consistency": 1.0,
    "temporal flickering": 1.0,
    "motion smoothness": 1.0,
    "aesthetic quality": 1.0,
    "imaging quality": 1.0,
    "dynamic degree": 0.5,
}
SEMANTIC = (
    "object class", "multiple objects", "human action", "color", "spatial relationship", "scene", "appearance style",
    "temporal style", "overall consistency",
)  # fmt: skip
RANGES = {
    "subject consistency": (0.1462, 1.0),
    "background consistency": (0.2615, 1.0),
    "temporal flickering": (0.6293, 1.0),
    "motion smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance style": (0.0009, 0.2855),
    "temporal style": (0.0, 0.364),
    "overall consistency": (0.0, 0.364),
}
"""Raw values that become 0 and 1; the other dimensions have (0, 1)."""
_QUALITY_SHARE = 4.0
"""Weight of quality in the total, where semantics has 1."""
_LARGEST = 0.05
"""Share of pixels whose motion counts."""


@dataclass(frozen=True)
class VBenchSummary:
    """Totals, about 0 to 1.

    Args:
        quality, semantic, total: weighted means of normalised dimensions.
        missing: dimensions that were not given; officially they enter as raw 0.
    """

    quality: float
    semantic: float
    total: float
    missing: tuple[str, ...]


def summarise(raw: Mapping[str, float]) -> VBenchSummary:
    """Summarise raw scores.

    Args:
        raw: dimension -> raw value in [0, 1]; underscores count as blanks.

    Raises:
        UserError: for an unknown dimension.
    """
    known = [*QUALITY_WEIGHTS, *SEMANTIC]
    values = {name.replace("_", " "): value for name, value in raw.items()}
    for name in values:
        if name not in known:
            raise unknown("dimension of VBench", name, known)

    def normalised(name: str) -> float:
        low, high = RANGES.get(name, (0.0, 1.0))
        return (values.get(name, 0.0) - low) / (high - low)

    weighted = sum(weight * normalised(name) for name, weight in QUALITY_WEIGHTS.items())
    quality = weighted / sum(QUALITY_WEIGHTS.values())
    semantic = sum(normalised(name) for name in SEMANTIC) / len(SEMANTIC)
    total = (_QUALITY_SHARE * quality + semantic) / (_QUALITY_SHARE + 1)
    return VBenchSummary(quality, semantic, total, tuple(name for name in known if name not in values))


@dataclass(frozen=True)
class Motion:
    """Whether a video moves.

    Args:
        threshold: motion in pixels above which a pair of frames moves.
        count_needed: moving pairs that make a moving video.
        pair_scores: (pairs,) mean of the largest motions of each pair.
        dynamic: enough pairs move.
    """

    threshold: float
    count_needed: int
    pair_scores: Tensor
    dynamic: bool


def dynamic_degree(flows: Tensor, frames: int) -> Motion:
    """Judge a video by its optical flow.

    Args:
        flows: (pairs, 2, height, width) motion in pixels between neighbouring frames, thinned to about 8 a second.
        frames: number of frames after thinning.
    """
    height, width = flows.shape[-2:]
    threshold = 6.0 * min(height, width) / 256.0
    needed = round(4 * frames / 16.0)
    magnitudes = flows.square().sum(1).sqrt().flatten(1)
    largest = magnitudes.topk(max(1, int(_LARGEST * height * width)), dim=1).values.mean(1)
    return Motion(threshold, needed, largest, int((largest > threshold).sum()) >= needed)
