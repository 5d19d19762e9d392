"""Nested state as safetensors plus JSON: no pickles, exact to the bit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_TENSOR = "__tensor__"
_PLAIN = (str, int, float, bool, type(None))


def pack(state: Any) -> tuple[Any, dict[str, Tensor]]:
    """Split a tree of dicts, lists, tensors and plain values into JSON and named tensors.

    Dictionary keys become text: whoever had numbers there turns them back.

    Raises:
        TypeError: for values of other types, by their place in the tree.
    """
    tensors: dict[str, Tensor] = {}

    def walk(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            # of its own memory: safetensors refuses views that overlap
            tensors[path] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            return {_TENSOR: path}
        if isinstance(value, dict):
            return {str(key): walk(item, f"{path}/{key}") for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [walk(item, f"{path}/{index}") for index, item in enumerate(value)]
        if isinstance(value, _PLAIN):
            return value
        raise TypeError(
            f"state at {path or 'the top'} is a {type(value).__name__}: only tensors and plain values are saved"
        )

    return walk(state, ""), tensors


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """Put together what :func:`pack` split."""
    if isinstance(tree, dict):
        if set(tree) == {_TENSOR}:
            return tensors[tree[_TENSOR]]
        return {key: unpack(item, tensors) for key, item in tree.items()}
    if isinstance(tree, list):
        return [unpack(item, tensors) for item in tree]
    return tree
