"""Attention kernels by name, through diffusers' own switches."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal, get_args

from diffalign.errors import MissingExtra, UserError, unknown

AttentionBackend = Literal["sdpa", "xformers", "flash", "flex"]


def set_attention_backend(module: Any, name: AttentionBackend) -> None:
    """Choose the attention kernels of a diffusers model.

    Args:
        module: the denoiser.
        name: "sdpa" (torch's own choice, the default), "xformers", "flash" (package flash-attn) or "flex" (torch).

    Raises:
        UserError: for an unknown name, a missing package, or a model or device that cannot run those kernels.
    """
    if name not in get_args(AttentionBackend):
        raise unknown("attention backend", name, get_args(AttentionBackend))
    if name == "sdpa":
        return
    if name == "xformers" and importlib.util.find_spec("xformers") is None:
        raise MissingExtra("xformers", "xformers", "--attention_backend xformers")
    try:
        if name == "xformers":
            module.enable_xformers_memory_efficient_attention()
        else:
            module.set_attention_backend(name)
    except (ImportError, ValueError, RuntimeError) as error:
        raise UserError(f"--attention_backend {name} does not work here: {error}; use sdpa") from error
