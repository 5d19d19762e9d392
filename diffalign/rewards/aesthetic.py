"""LAION's improved aesthetic predictor (christophschuhmann/improved-aesthetic-predictor, Apache-2.0).

An affine head over unit embeddings of OpenAI's CLIP ViT-L/14; about 1 to 10. The caption is not looked at.
"""

from __future__ import annotations

import math

import torch

from diffalign.errors import UserError
from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.checkpoints import read_state
from diffalign.rewards.clip_score import OFFICIAL
from diffalign.rewards.heads import AffineHead, HeadReward
from diffalign.rewards.hub import checkpoint_file
from diffalign.rewards.pickscore import PickScore
from diffalign.rewards.registry import LoadOptions, register

HEAD = "sac+logos+ava1-l14-linearMSE.pth"
INFO = RewardInfo("aesthetic", "rating of about 1 to 10", (-math.inf, math.inf), True, licence="Apache-2.0")


def load_aesthetic(
    head: str, backbone: str = OFFICIAL, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> HeadReward:
    """Load the predictor.

    Args:
        head: its checkpoint file, ``sac+logos+ava1-l14-linearMSE.pth`` of the official repository.
        backbone: the CLIP model by hub name, local folder or bundled name.
        device, dtype: where and how the backbone runs; the head runs in float32.

    Raises:
        UserError: if the file is absent or not this head, or the backbone's embeddings are of another width.
    """
    path = checkpoint_file(head)
    network = AffineHead.from_state(read_state(path), str(path)).to(device)
    clip = PickScore.load(backbone, device=device, dtype=dtype)
    wanted, width = network.dimensions, clip.towers.model.config.projection_dim
    if wanted != width:
        raise UserError(f"{path} reads embeddings of {wanted} numbers, but those of {backbone} have {width}")
    return HeadReward(clip.towers, clip.preprocess, network, INFO)


@register("aesthetic", summary="LAION aesthetic rating over CLIP ViT-L/14; ignores the caption")
def _load(options: LoadOptions) -> Reward:
    if options.source is None:
        raise UserError(
            f"the aesthetic head is not on the hub; download {HEAD} from "
            "github.com/christophschuhmann/improved-aesthetic-predictor and write 'aesthetic@PATH'"
        )
    return load_aesthetic(options.source, device=options.device, dtype=options.dtype)
