"""PAL's ideal points over a frozen CLIP model as a reward: for one person, for a mixture, or for everyone's mean."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.checkpoints import load_strictly, read_state
from diffalign.rewards.pal import PalConfig, PalHead
from diffalign.rewards.pickscore import PickScore
from diffalign.rewards.pixels import PixelReward
from diffalign.rewards.registry import LoadOptions, register

WEIGHTS_FILE, DESCRIPTION_FILE = "pal.safetensors", "pal.json"


def save_pal(folder: Path, head: PalHead, backbone: str) -> None:
    """Write a head, its shape, its users and what it stands on; the weights last."""
    folder.mkdir(parents=True, exist_ok=True)
    description = {"backbone": backbone, "config": asdict(head.config), "users": list(head.users)}
    (folder / DESCRIPTION_FILE).write_text(json.dumps(description, indent=1) + "\n", encoding="utf-8")
    partial = folder / f"{WEIGHTS_FILE}.partial"
    save_file({name: value.detach().cpu().contiguous() for name, value in head.state_dict().items()}, partial)
    partial.replace(folder / WEIGHTS_FILE)


def load_head(folder: Path) -> tuple[PalHead, str]:
    """Read what :func:`save_pal` wrote: the head, and the name of the CLIP model.

    Raises:
        UserError: if a file is absent, damaged, or the weights are of another shape.
    """
    path = folder / DESCRIPTION_FILE
    if not path.is_file():
        raise UserError(f"no PAL head at {folder}: it has no {DESCRIPTION_FILE}")
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
        head = PalHead(PalConfig(**description["config"]), description["users"])
        backbone = str(description["backbone"])
    except (ValueError, KeyError, TypeError) as problem:
        raise UserError(f"{path} does not describe a PAL head: {problem}") from problem
    load_strictly(head, read_state(folder / WEIGHTS_FILE), str(folder / WEIGHTS_FILE))
    return head.requires_grad_(False).eval(), backbone


class PalReward(PixelReward):
    """How near an image is to somebody's ideal point.

    Args:
        scorer: gives the frozen embeddings.
        head: the trained part.
        mixture: (K,) whose ideal point, of sum 1.
        whose: how reports call it.
    """

    def __init__(self, scorer: PickScore, head: PalHead, mixture: Tensor, whose: str) -> None:
        self.scorer, self.head, self.mixture = scorer, head, mixture
        self.preprocess = scorer.preprocess
        by_distance = head.config.distance == "dist"
        unit = "distance to the ideal point, negated" if by_distance else "scaled cosine to the ideal point"
        span = (-math.inf, 0.0) if by_distance else (-100.0, 100.0)
        self.info = RewardInfo(f"pal for {whose}", unit, span, differentiable=True, licence="of the model")

    @classmethod
    def load(
        cls,
        source: str,
        user: str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> PalReward:
        """Load a folder that ``train_reward.py --objective pal`` wrote.

        Args:
            source: the folder.
            user: somebody the head was trained with; the mean of everyone's mixtures by default.
            device, dtype: where and how the CLIP model runs; the head runs in float32.

        Raises:
            UserError: if the folder holds no head, or does not know the user.
        """
        head, backbone = load_head(Path(source).expanduser())
        head = head.to(device)
        scorer = PickScore.load(backbone, device=device, dtype=dtype)
        mixture = head.mixtures(list(head.users) if user is None else [user]).mean(0)
        return cls(scorer, head, mixture, user or "everyone")

    def for_user(self, user: str) -> PalReward:
        """Return the reward of somebody the head was trained with.

        Raises:
            UserError: for a name that it does not know.
        """
        return PalReward(self.scorer, self.head, self.head.mixtures([user])[0], user)

    def for_mixture(self, mixture: Sequence[float]) -> PalReward:
        """Return the reward of a mixture of the shared points.

        Args:
            mixture: K shares of sum 1; they are taken as they are.

        Raises:
            UserError: if they are not K shares of sum 1.
        """
        shares = torch.tensor(mixture, device=self.mixture.device)
        if shares.shape != self.mixture.shape or (shares < 0).any() or abs(shares.sum().item() - 1) > 1e-4:
            raise UserError(f"a mixture of PAL has {len(self.mixture)} shares of sum 1; these are {list(mixture)}")
        return PalReward(self.scorer, self.head, shares, "a mixture")

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return scores, (batch,)."""
        images = self.scorer.towers.image(pixels)
        captions = self.scorer.towers.text(prompts) if self.head.config.place == "prompt" else None
        mixtures = self.mixture.expand(len(images), -1)
        scores: Tensor = self.head(images, self.head.ideal_points(mixtures, captions))
        return scores


@register("pal", summary="nearness to the ideal point of one person (@FOLDER#USER) or of all", paper="arXiv 2406.08469")
def _load(options: LoadOptions) -> Reward:
    if options.source is None:
        raise UserError(
            "'pal' has no official image weights: train a head with train_reward.py --objective pal and write "
            "'pal@FOLDER', or 'pal@FOLDER#USER' for one person"
        )
    folder, _, user = options.source.partition("#")
    return PalReward.load(folder, user or None, options.device, options.dtype)
