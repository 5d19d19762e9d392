"""A user's own head over CLIP embeddings: layers in a safetensors file, and a line or two about them.

A folder with ``head.safetensors``, whose tensors ``N.weight`` and ``N.bias`` are linear layers in the order of N, and
``head.json``::

    {"backbone": "openai/clip-vit-large-patch14", "activation": "relu", "unit": "rating of 1 to 10", "range": [1, 10]}
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import UserError, unknown
from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.checkpoints import load_strictly, read_state
from diffalign.rewards.heads import HeadReward
from diffalign.rewards.pickscore import PickScore
from diffalign.rewards.registry import LoadOptions, register

WEIGHTS_FILE, DESCRIPTION_FILE = "head.safetensors", "head.json"
ACTIVATIONS = {"none": lambda x: x, "relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class MlpHead(nn.Module):
    """Linear layers with an activation between them.

    Args:
        widths: of the embedding, of the layers between, and 1.
        activation: one of :data:`ACTIVATIONS`.

    Raises:
        UserError: for an unknown activation, or a last layer that gives more than one number.
    """

    def __init__(self, widths: list[int], activation: str = "relu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise unknown("activation", activation, ACTIVATIONS)
        if len(widths) < 2 or widths[-1] != 1:
            raise UserError(f"a head gives one number an image; this one has the widths {widths}")
        self.activation = ACTIVATIONS[activation]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in itertools.pairwise(widths))

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], activation: str, where: str) -> MlpHead:
        """Build a frozen head; the shape is that of the tensors, whatever stands before the numbers of the layers.

        Raises:
            UserError: if the tensors are no chain of linear layers that ends in one number.
        """
        found = {name: re.fullmatch(r"(?:.*\.)?(\d+)\.(weight|bias)", name) for name in state}
        if odd := [name for name, match in found.items() if match is None]:
            raise UserError(f"{where} has a tensor {odd[0]!r}; expected N.weight and N.bias of linear layers")
        numbers = sorted({int(match[1]) for match in found.values() if match})
        renamed = {f"layers.{numbers.index(int(m[1]))}.{m[2]}": state[name] for name, m in found.items() if m}
        weights = [renamed.get(f"layers.{index}.weight") for index in range(len(numbers))]
        shapes = [tuple(weight.shape) for weight in weights if weight is not None and weight.dim() == 2]
        if not shapes or len(shapes) < len(numbers):
            raise UserError(f"{where} has layers {numbers}, but not every one has a weight of two dimensions")
        head = cls([shapes[0][1], *(shape[0] for shape in shapes)], activation)
        load_strictly(head, renamed, where)
        return head.requires_grad_(False).eval()

    def forward(self, embeddings: Tensor) -> Tensor:
        """Score embeddings (batch, dimensions), (batch,)."""
        x = embeddings
        for index, layer in enumerate(self.layers):
            x = layer(self.activation(x) if index else x)
        return x.squeeze(-1)


def load_mlp_head(
    folder: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> HeadReward:
    """Load a folder as the module's first lines describe it.

    Args:
        folder: with the head and its description.
        device, dtype: where and how the CLIP model runs; the head runs in float32.

    Raises:
        UserError: if a file is absent or not of that form, or the CLIP model's embeddings have another width.
    """
    place = Path(folder).expanduser()
    description = _describe(place / DESCRIPTION_FILE)
    weights = place / WEIGHTS_FILE
    head = MlpHead.from_state(read_state(weights), str(description.get("activation", "relu")), str(weights))
    backbone = str(description["backbone"])
    clip = PickScore.load(backbone, device=device, dtype=dtype)
    wanted, width = head.layers[0].in_features, clip.towers.model.config.projection_dim
    if wanted != width:
        raise UserError(f"{weights} reads embeddings of {wanted} numbers, but those of {backbone} have {width}")
    low, high = description.get("range", (-math.inf, math.inf))
    info = RewardInfo(
        str(description.get("name", place.name)),
        str(description.get("unit", "as the head gives")),
        (float(low), float(high)),
        differentiable=True,
        licence=str(description.get("licence", "")),
    )
    return HeadReward(clip.towers, clip.preprocess, head.float().to(device), info)


def _describe(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"no head at {path.parent}: it has no {DESCRIPTION_FILE}")
    try:
        description: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        low, high = description.get("range", (0, 1))
        float(low), float(high), description["backbone"]
    except (ValueError, KeyError, TypeError, AttributeError) as problem:
        raise UserError(
            f"{path}: expected an object with 'backbone', and perhaps activation, name, unit, range of two numbers, "
            f"licence ({problem!r})"
        ) from problem
    return description


@register("mlp_head", summary="your own head over CLIP embeddings: mlp_head@FOLDER; ignores the caption")
def _load(options: LoadOptions) -> Reward:
    if options.source is None:
        raise UserError(
            f"'mlp_head' needs a folder with {WEIGHTS_FILE} and {DESCRIPTION_FILE}: write 'mlp_head@FOLDER'"
        )
    return load_mlp_head(options.source, options.device, options.dtype)
