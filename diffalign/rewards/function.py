"""Any Python function as a reward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import Metadata, Reward, RewardInfo


class FunctionReward(Reward):
    """Wraps ``function(images, prompts) -> (batch,)``.

    Example::

        bright = FunctionReward(lambda images, prompts: images.mean(dim=(1, 2, 3)), "brightness", differentiable=True)

    Args:
        function: sees images (batch, 3, height, width) in [0, 1] and one caption an image; returns numbers or a tensor.
        name: how reports call it.
        differentiable: gradients with respect to the images exist and mean something.
        span: least and greatest value.
        unit: what one unit means.
    """

    def __init__(
        self,
        function: Callable[[Tensor, Sequence[str]], Tensor | Sequence[float]],
        name: str,
        differentiable: bool = False,
        span: tuple[float, float] = (-math.inf, math.inf),
        unit: str = "as the function returns",
    ) -> None:
        self.function = function
        self.info = RewardInfo(name, unit, span, differentiable)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return the function's scores, (batch,) float32.

        Raises:
            UserError: if it does not return one number an image.
        """
        scores = torch.as_tensor(self.function(images, prompts), device=images.device).float()
        if scores.shape != (len(images),):
            raise UserError(
                f"the reward {self.info.name!r} returned shape {tuple(scores.shape)} for {len(images)} images; "
                f"expected ({len(images)},)"
            )
        return scores if self.info.differentiable else scores.detach()
