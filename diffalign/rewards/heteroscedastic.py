"""A PickScore-like scorer that also says how sure it is: a linear head on both embeddings gives the variance.

Trained with :func:`diffalign.rewards.objective.heteroscedastic_cross_entropy`: the mean is the CLIP model's preference
logit, and doubtful images pull less. With ``caution`` above 0 the reward is ``mean - caution * deviation``: what the
scorer does not know is then not worth seeking.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.checkpoints import load_strictly, read_state
from diffalign.rewards.pickscore import PickScore, preference_logits
from diffalign.rewards.pixels import PixelReward
from diffalign.rewards.registry import LoadOptions, register

VARIANCE_FILE = "variance_head.safetensors"


class VarianceHead(nn.Module):
    """Logarithm of the variance of a score from the unit embeddings of image and caption; 0 at the start.

    Args:
        dimensions: of one embedding.
    """

    def __init__(self, dimensions: int) -> None:
        super().__init__()
        self.linear = nn.Linear(2 * dimensions, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """Return log-variances (batch,) of unit embeddings (batch, dimensions)."""
        result: Tensor = self.linear(torch.cat([image, text], dim=-1))
        return result.squeeze(-1)


class HeteroscedasticScore(PixelReward):
    """Build it with :meth:`load`.

    Args:
        scorer: gives the mean.
        head: gives the variance, kept frozen.
        caution: standard deviations taken off the mean.
    """

    def __init__(self, scorer: PickScore, head: VarianceHead, caution: float = 0.0) -> None:
        self.scorer, self.head, self.caution = scorer, head.requires_grad_(False).eval(), caution
        self.preprocess = scorer.preprocess
        unit = scorer.info.unit + (f" less {caution:g} deviations" if caution else "")
        self.info = RewardInfo(f"doubtful {scorer.info.name}", unit, (-math.inf, 100.0), True, licence="of the model")

    @classmethod
    def load(
        cls,
        source: str,
        caution: float = 0.0,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> HeteroscedasticScore:
        """Load a folder that ``train_reward.py --objective heteroscedastic`` wrote.

        Args:
            source: the folder.
            caution: see the class.
            device, dtype: where and how the towers run; the head runs in float32.

        Raises:
            UserError: if the folder has no variance head, or one of another width.
        """
        path = Path(source).expanduser() / VARIANCE_FILE
        state = read_state(path)
        scorer = PickScore.load(source, device=device, dtype=dtype)
        head = VarianceHead(scorer.towers.model.config.projection_dim)
        load_strictly(head, state, str(path))
        return cls(scorer, head.to(device), caution)

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores, (batch,)."""
        mean, variance = self.distributions(pixels, prompts)
        return mean - self.caution * variance.sqrt()

    def distributions(self, pixels: Tensor, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return means and variances (batch,) of prepared pixels."""
        towers = self.scorer.towers
        image, text = towers.image(pixels), towers.text(prompts)
        return preference_logits(image, text, towers.logit_scale), self.head(image, text).exp()


@register("heteroscedastic", summary="a trained preference scorer that says how sure it is")
def _load(options: LoadOptions) -> Reward:
    if options.source is None:
        raise UserError(
            "'heteroscedastic' has no official weights: train one with train_reward.py --objective heteroscedastic and "
            "write 'heteroscedastic@FOLDER'"
        )
    return HeteroscedasticScore.load(options.source, device=options.device, dtype=options.dtype)
