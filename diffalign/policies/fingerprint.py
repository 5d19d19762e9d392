"""Short names for weights, the same on every device."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(tensors: Iterable[tuple[str, Tensor]], salt: str = "", max_values: int = 0) -> str:
    """Hash named tensors to 16 hexadecimal digits, the same on every device.

    Args:
        tensors: names and values.
        salt: further text to hash.
        max_values: read only so many evenly spaced values of each tensor; 0 for all.
    """
    digest = hashlib.sha256(salt.encode())
    for name, tensor in sorted(tensors, key=lambda item: item[0]):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        values = tensor.detach().reshape(-1)
        if max_values and values.numel() > max_values:
            values = values[:: -(-values.numel() // max_values)]
        digest.update(values.contiguous().cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
