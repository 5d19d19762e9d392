"""Attention kernels by name, through diffusers' dispatcher."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import MissingExtra, UserError, unknown

AttentionBackend = Literal["sdpa", "xformers", "flash", "flex"]


def set_attention_backend(module: nn.Module, name: AttentionBackend) -> None:
    """Choose the attention kernels of a diffusers model.

    Args:
        module: the denoiser.
        name: "sdpa" (torch's own choice among its kernels, the default), "xformers", "flash" (package flash-attn) or
            "flex" (torch's flexible attention, which is slow unless it is compiled).

    Raises:
        UserError: for an unknown name, a missing package or accelerator, or layers that want more than these kernels.
    """
    require_attention_backend(name)
    if name != "sdpa":
        dispatch_attention(module, name)


def require_attention_backend(name: str) -> None:
    """Refuse attention kernels that cannot run here.

    Raises:
        UserError: for an unknown name, a missing package or accelerator.
    """
    if name not in get_args(AttentionBackend):
        raise unknown("attention backend", name, get_args(AttentionBackend))
    if name == "sdpa":
        return
    option = f"--attention_backend {name}"
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise MissingExtra("xformers", "xformers", option)
    if name == "flash" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(f"{option} needs the package flash-attn, which is not installed; use sdpa, or install it")
    if not torch.cuda.is_available():
        raise UserError(f"{option} needs a GPU and there is none: use sdpa")


def dispatch_attention(module: nn.Module, backend: str) -> None:
    """Send all attention of a model through diffusers' dispatcher.

    The layers of its newer models go there by themselves; those of UNets and SD3 call torch directly, whatever backend
    is set, and get a processor that goes there.

    Args:
        module: the model.
        backend: a name of ``diffusers.models.attention_dispatch.AttentionBackendName``.

    Raises:
        UserError: for layers with normalisation or residuals inside, which this processor does not compute.
    """
    from diffusers.models.attention_processor import Attention

    layers: list[Any] = [layer for layer in module.modules() if isinstance(layer, Attention)]
    for layer in layers:
        if layer.group_norm is not None or layer.spatial_norm is not None or layer.residual_connection:
            raise UserError(f"the attention layers of {type(module).__name__} know torch's kernels only: use sdpa")
    for layer in layers:
        layer.set_processor(DispatchedAttention(backend))
    if not layers:
        try:
            module.set_attention_backend(backend)  # type: ignore[operator]
        except (ImportError, ValueError, RuntimeError) as error:
            raise UserError(f"the attention backend {backend!r} does not work here: {error}") from error


def takes_token_counts(module: nn.Module) -> bool:
    """Whether the model's attention can let one text token stand for many: see :class:`DispatchedAttention`."""
    processors = getattr(module, "attn_processors", {}).values()
    return bool(processors) and all(isinstance(p, DispatchedAttention) and p.takes_counts for p in processors)


class DispatchedAttention:
    """Processor of diffusers' ``Attention``: self, cross and joint attention, unmasked, by a kernel of one's choice.

    Joint attention may count text tokens: text has no positions there, so that n equal tokens stay equal in every
    layer, and one token whose score is raised by log n does the work of all.

    Args:
        backend: see :func:`dispatch_attention`.
    """

    def __init__(self, backend: str) -> None:
        from diffusers.models.attention_dispatch import AttentionBackendName

        self.backend = AttentionBackendName(backend)

    @property
    def takes_counts(self) -> bool:
        """Whether the kernel adds a bias to the scores."""
        return self.backend.value == "native"

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        token_counts: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from (rows, tokens, width) to itself, to a text, or (joint) from and to both.

        ``token_counts`` (rows, text tokens) says how many equal tokens each text token stands for, 1 without it.
        """
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        if attention_mask is not None:
            raise ValueError("attention here takes no mask")
        text, joint = encoder_hidden_states, getattr(attn, "add_k_proj", None) is not None
        joint = joint and text is not None
        source = hidden_states if text is None or joint else text
        if source is text and attn.norm_cross:
            source = attn.norm_encoder_hidden_states(text)
        query = _heads(attn, attn.to_q(hidden_states), attn.norm_q)
        key = _heads(attn, attn.to_k(source), attn.norm_k)
        value = _heads(attn, attn.to_v(source))
        if joint:
            query = torch.cat([query, _heads(attn, attn.add_q_proj(text), attn.norm_added_q)], dim=1)
            key = torch.cat([key, _heads(attn, attn.add_k_proj(text), attn.norm_added_k)], dim=1)
            value = torch.cat([value, _heads(attn, attn.add_v_proj(text))], dim=1)
        # under autocast the norms give float32, and kernels outside torch want one type
        query, key = query.to(value.dtype), key.to(value.dtype)
        tokens = hidden_states.shape[1]
        bias = None
        if joint and token_counts is not None:  # (rows, 1, 1, image and text tokens)
            bias = F.pad(token_counts.log().to(query.dtype), (tokens, 0))[:, None, None]
        attended = dispatch_attention_fn(query, key, value, attn_mask=bias, backend=self.backend)
        attended = attended.flatten(2).to(query.dtype)
        image = attn.to_out[1](attn.to_out[0](attended[:, :tokens])) / attn.rescale_output_factor
        if not joint:
            return image
        rest = attended[:, tokens:]
        return image, rest if attn.context_pre_only else attn.to_add_out(rest)


def _heads(attn: Any, projected: Tensor, norm: nn.Module | None = None) -> Tensor:
    """Split (rows, tokens, width) into (rows, tokens, heads, width / heads), normalised where the model does so."""
    split = projected.unflatten(-1, (attn.heads, -1))
    return split if norm is None else norm(split)
