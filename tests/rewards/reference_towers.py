"""open_clip's plain ViT and causal text tower, written out on tensors under the names of its checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]

CONFIG: dict[str, Any] = {
    "embed_dim": 8,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 20, "head_width": 10, "patch_size": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2},
}


def random_state(seed: int = 0) -> State:
    """A checkpoint of the configuration with random numbers, named as open_clip names them."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 0.3) -> Tensor:
        return torch.randn(*shape, generator=generator) * scale

    def blocks(prefix: str, width: int) -> State:
        state = {}
        for index in range(2):
            at = f"{prefix}transformer.resblocks.{index}."
            state |= {f"{at}attn.in_proj_weight": draw(3 * width, width), f"{at}attn.in_proj_bias": draw(3 * width)}
            state |= {f"{at}attn.out_proj.weight": draw(width, width), f"{at}attn.out_proj.bias": draw(width)}
            state |= {f"{at}mlp.c_fc.weight": draw(4 * width, width), f"{at}mlp.c_fc.bias": draw(4 * width)}
            state |= {f"{at}mlp.c_proj.weight": draw(width, 4 * width), f"{at}mlp.c_proj.bias": draw(width)}
            for name in ("ln_1", "ln_2"):
                state |= {f"{at}{name}.weight": 1 + draw(width), f"{at}{name}.bias": draw(width)}
        return state

    state = {"visual.class_embedding": draw(20), "visual.positional_embedding": draw(5, 20)}
    state |= {"visual.conv1.weight": draw(20, 3, 8, 8), "visual.proj": draw(20, 8)}
    state |= {"token_embedding.weight": draw(49408, 16), "positional_embedding": draw(77, 16)}
    state |= {"text_projection": draw(16, 8), "logit_scale": torch.tensor(4.6)}
    for name, width in (("visual.ln_pre", 20), ("visual.ln_post", 20), ("ln_final", 16)):
        state |= {f"{name}.weight": 1 + draw(width), f"{name}.bias": draw(width)}
    return state | blocks("visual.", 20) | blocks("", 16)


def image_embedding(state: State, pixels: Tensor) -> Tensor:
    """Projected image embeddings (batch, 8) of pixels (batch, 3, 16, 16)."""
    x = F.conv2d(pixels, state["visual.conv1.weight"], stride=8).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(len(x), 1, -1), x], dim=1)
    x = _norm(state, "visual.ln_pre", x + state["visual.positional_embedding"])
    x = _blocks(state, "visual.", x, heads=2, mask=None)
    return _norm(state, "visual.ln_post", x[:, 0]) @ state["visual.proj"]


def text_embedding(state: State, tokens: Tensor) -> Tensor:
    """Projected text embeddings (batch, 8) of tokens (batch, 77), pooled at the first end token."""
    x = state["token_embedding.weight"][tokens] + state["positional_embedding"]
    mask = torch.full((77, 77), float("-inf")).triu(1)
    x = _norm(state, "ln_final", _blocks(state, "", x, heads=2, mask=mask))
    return x[torch.arange(len(x)), tokens.argmax(-1)] @ state["text_projection"]


def _norm(state: State, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])


def _blocks(state: State, prefix: str, x: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    for index in range(2):
        at = f"{prefix}transformer.resblocks.{index}."
        y = _norm(state, f"{at}ln_1", x)
        qkv = F.linear(y, state[f"{at}attn.in_proj_weight"], state[f"{at}attn.in_proj_bias"])
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5
        scores = scores if mask is None else scores + mask
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, state[f"{at}attn.out_proj.weight"], state[f"{at}attn.out_proj.bias"])
        y = F.gelu(F.linear(_norm(state, f"{at}ln_2", x), state[f"{at}mlp.c_fc.weight"], state[f"{at}mlp.c_fc.bias"]))
        x = x + F.linear(y, state[f"{at}mlp.c_proj.weight"], state[f"{at}mlp.c_proj.bias"])
    return x
