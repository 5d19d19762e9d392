"""MPS (Zhang et al., CVPR 2024; official code Kwai-Kolors/MPS, MIT), the published "overall" dimension.

CLIP ViT-H/14 with a cross model: the image's tokens look at those words of the caption that are near to a list of words
about the dimension. The score is the scaled cosine of the caption and of what the image's first token then says.

The official checkpoint is a pickled module; its tensors are read without its code (``pickled_module.py``).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.checkpoints import load_strictly
from diffalign.rewards.clip_model import unit
from diffalign.rewards.hub import checkpoint_file
from diffalign.rewards.open_clip_weights import architecture, clip_config, clip_tokenizer
from diffalign.rewards.pickled_module import read_module
from diffalign.rewards.pickscore import preference_logits
from diffalign.rewards.pixels import PixelReward
from diffalign.rewards.preprocess import ClipPreprocess
from diffalign.rewards.registry import LoadOptions, register

CHECKPOINT = "MPS_overall_checkpoint.pth"
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, structure, instance, "
    "texture, quantity, attributes, position, number, location, word, things."
)
"""Words of the dimension "overall"."""
THRESHOLD = 0.3
"""Of a word's likeness to the dimension over the greatest of its caption; 0.3 in the official evaluation of pairs."""
LAYERS, HEADS, HEAD_WIDTH, GROWTH = 4, 16, 64, 4
_CONSTANTS = re.compile(r"\.position_ids$|\.inv_freq$|^cross_model\..*\.norm\.bias$|\.pos_emb$")
"""Buffers of the official modules that are computed here, or 0."""


class _Norm(nn.Module):
    """Layer normalisation with a scale and no shift."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight)


class _GatedUnit(nn.Module):
    """SwiGLU: half of the numbers gate the other half."""

    def forward(self, x: Tensor) -> Tensor:
        values, gate = x.chunk(2, dim=-1)
        return F.silu(gate) * values


def _attend(queries: Tensor, keys: Tensor, values: Tensor, seen: Tensor | None = None) -> Tensor:
    """Attention of many heads over one head of keys and values.

    Args:
        queries: (batch, heads, tokens, width).
        keys, values: (batch, others, width).
        seen: (batch, others) bool, true where others may be looked at.

    Returns:
        (batch, tokens, heads * width).
    """
    heads = queries.shape[1]
    keys, values = (x[:, None].expand(-1, heads, -1, -1) for x in (keys, values))
    mask = None if seen is None else seen[:, None, None]
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask).transpose(1, 2).flatten(2)


class _CrossAttention(nn.Module):
    """Image tokens look at words; a feed-forward part runs beside it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _Norm(width)
        self.to_q = nn.Linear(width, HEADS * HEAD_WIDTH, bias=False)
        self.to_kv = nn.Linear(width, 2 * HEAD_WIDTH, bias=False)
        self.to_out = nn.Linear(HEADS * HEAD_WIDTH, width, bias=False)
        inner = GROWTH * width
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * inner, bias=False), _GatedUnit(), nn.Linear(inner, width, bias=False)
        )

    def forward(self, x: Tensor, words: Tensor, seen: Tensor) -> Tensor:
        x = self.norm(x)
        queries = self.to_q(x).unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2)
        keys, values = self.to_kv(words).chunk(2, dim=-1)
        return self.to_out(_attend(queries, keys, values, seen)) + self.ff(x)


class _ParallelBlock(nn.Module):
    """Self attention with rotary positions and a feed-forward part, side by side from one projection."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = _Norm(width)
        self.parts = (HEADS * HEAD_WIDTH, HEAD_WIDTH, HEAD_WIDTH, 2 * GROWTH * width)
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.parts), bias=False)
        self.attn_out = nn.Linear(HEADS * HEAD_WIDTH, width, bias=False)
        self.ff_out = nn.Sequential(_GatedUnit(), nn.Linear(GROWTH * width, width, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        q, keys, values, inner = self.fused_attn_ff_proj(self.norm(x)).split(self.parts, dim=-1)
        queries = rotated(q.unflatten(-1, (HEADS, HEAD_WIDTH)).transpose(1, 2))
        return self.attn_out(_attend(queries, rotated(keys), values)) + self.ff_out(inner)


def rotated(x: Tensor) -> Tensor:
    """Apply rotary positions to (..., tokens, width): pairs of the first and the second half of the numbers turn."""
    tokens, width = x.shape[-2:]
    rates = 10000.0 ** (-torch.arange(0, width, 2, device=x.device, dtype=torch.float32) / width)
    angles = torch.arange(tokens, device=x.device, dtype=torch.float32)[:, None] * rates
    sine, cosine = (torch.cat([part, part], dim=-1).to(x.dtype) for part in (angles.sin(), angles.cos()))
    first, second = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-second, first], dim=-1) * sine


class _Residual(nn.Module):
    """Adds what it was given; names the wrapped module as the checkpoint does."""

    def __init__(self, fn: nn.Module) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        result: Tensor = self.fn(x, *others)
        return x + result


class MpsNetwork(nn.Module):
    """CLIP and the cross model; parameters are called as in the official checkpoint.

    Args:
        config: of the CLIP model.
    """

    def __init__(self, config: Any) -> None:
        from transformers import CLIPModel

        super().__init__()
        self.model: Any = CLIPModel(config)
        width = config.projection_dim
        blocks = [
            nn.ModuleList([_Residual(_CrossAttention(width)), _Residual(_ParallelBlock(width))]) for _ in range(LAYERS)
        ]
        self.cross_model = nn.ModuleDict({"layers": nn.ModuleList(blocks)})

    def words(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return projected states of all tokens (batch, length, width) and of the end token (batch, width)."""
        output = self.model.text_model(input_ids=input_ids)
        projection = self.model.text_projection
        return projection(output.last_hidden_state), projection(output.pooler_output)

    def forward(self, pixels: Tensor, words: Tensor, relevant: Tensor) -> Tensor:
        """Return what images say (batch, width).

        Args:
            pixels: prepared images.
            words: (batch, length, width) of the captions.
            relevant: (batch, length) bool, words that are looked at.
        """
        seen = self.model.vision_model(pixel_values=pixels).last_hidden_state
        x = self.model.visual_projection(seen)
        for cross, block in self.cross_model["layers"]:  # type: ignore[attr-defined]
            x = block(cross(x, words, relevant))
        return x[:, 0]


def relevant_words(words: Tensor, condition: Tensor, threshold: float = THRESHOLD) -> Tensor:
    """Choose the words of captions that have to do with a dimension, (batch, length) bool.

    Likeness is relative to the most alike word of the same caption. (The official code divides by the greatest of the
    batch, so that scores depend on it; one by one, as its evaluation runs, both are the same.)

    Args:
        words: (batch, length, width) of captions.
        condition: (other length, width) of the dimension's words.
        threshold: share of the greatest likeness.
    """
    likeness = (words @ condition.T).amax(-1)
    return likeness / likeness.amax(-1, keepdim=True) > threshold


class Mps(PixelReward):
    """Build it with :meth:`load`.

    Args:
        network: kept frozen.
        tokenizer: CLIP's; it pads with the end token.
        threshold: see :func:`relevant_words`.
    """

    def __init__(self, network: MpsNetwork, tokenizer: Any, threshold: float = THRESHOLD) -> None:
        self.network, self.tokenizer, self.threshold = network.requires_grad_(False).eval(), tokenizer, threshold
        self.preprocess = ClipPreprocess(network.model.config.vision_config.image_size)
        self.info = RewardInfo(
            "mps", f"preference logit, words above {threshold:g}", (-100.0, 100.0), differentiable=True, licence="MIT"
        )

    @classmethod
    def load(
        cls,
        source: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        config: Mapping[str, Any] | None = None,
    ) -> Mps:
        """Load the official checkpoint.

        Args:
            source: the file ``MPS_overall_checkpoint.pth``.
            device, dtype: where and how the network runs; the final product is always float32.
            config: open_clip's configuration of the CLIP model; ViT-H-14 by default.

        Raises:
            UserError: if the file is absent or of another architecture.
        """
        from accelerate import init_empty_weights

        path = checkpoint_file(source)
        state = {name: value for name, value in read_module(path).items() if not _CONSTANTS.search(name)}
        with init_empty_weights():  # Random numbers would take long; constants are computed.
            network = MpsNetwork(clip_config(config or architecture("ViT-H-14")))
        load_strictly(network, state, str(path))
        return cls(network.to(device, dtype), clip_tokenizer())

    def score_pixels(self, pixels: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return preference logits, (batch,)."""
        place = self.network.model.logit_scale
        tokens = self.tokenizer([*prompts, CONDITION], padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            words, texts = self.network.words(tokens.input_ids.to(place.device))
            relevant = relevant_words(words[:-1], words[-1], self.threshold)
        images = self.network(pixels.to(place.device, place.dtype), words[:-1], relevant)
        return preference_logits(unit(images), unit(texts[:-1]), place.float().exp())


@register("mps", summary="multi-dimensional preference score, overall", paper="arXiv 2405.14705")
def _load(options: LoadOptions) -> Reward:
    if options.source is None:
        raise UserError(
            f"MPS's checkpoint is not on the hub; download {CHECKPOINT} as github.com/Kwai-Kolors/MPS says and write "
            "'mps@PATH'"
        )
    return Mps.load(options.source, options.device, options.dtype)
