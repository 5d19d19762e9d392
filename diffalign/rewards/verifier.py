"""The bundled world's exact verifier as rewards: the strict verdict and the graded score. No network, no gradient."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import Metadata, Reward, RewardInfo
from diffalign.rewards.registry import LoadOptions, no_source, register


class Verifier(Reward):
    """Measures objects, colours, counts and positions by image analysis.

    Args:
        graded: return the share of satisfied atomic checks instead of the strict verdict.
    """

    def __init__(self, graded: bool = False) -> None:
        self.graded = graded
        unit = "share of satisfied checks" if graded else "strict verdict, 1 when everything asked for is there"
        self.info = RewardInfo("graded" if graded else "verifier", unit, (0.0, 1.0), False, needs_metadata=True)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return one verdict an image, (batch,) float32.

        Raises:
            UserError: if no metadata is given.
        """
        from diffalign.world.verifier import verify

        if metadata is None:
            raise UserError("the verifier needs the metadata of each caption (GenEval's row format); none was given")
        pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        verdicts = [verify(image, dict(row)) for image, row in zip(pixels, metadata, strict=True)]
        return torch.tensor([v.graded if self.graded else float(v.correct) for v in verdicts])


@register("verifier", summary="the bundled world's exact verdict on a caption: all of it, or nothing")
def _load_strict(options: LoadOptions) -> Reward:
    no_source("verifier", options)
    return Verifier()


@register("graded", summary="the bundled world's exact verifier: share of what the caption asks for")
def _load_graded(options: LoadOptions) -> Reward:
    no_source("graded", options)
    return Verifier(graded=True)
