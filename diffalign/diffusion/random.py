"""Randomness that belongs to an example, not to a batch.

Every example of a batch carries a seed for this visit; every draw derives from (seed, stream). So the split into
micro-batches, the number of processes, the device and an interruption change nothing of what is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def derive_seed(*parts: int | str) -> int:
    """Hash any mixture of integers and names into a non-negative 63-bit seed."""
    digest = hashlib.blake2b("\x1f".join(str(part) for part in parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def row_generators(seeds: Tensor, stream: str) -> list[torch.Generator]:
    """Return one CPU generator for each seed; different streams of one seed are independent.

    Args:
        seeds: (B,) int64.
        stream: names the use, for example "noise" or "timestep".
    """
    return [torch.Generator().manual_seed(derive_seed(seed, stream)) for seed in seeds.tolist()]


def randn_rows(
    seeds: Tensor, shape: Sequence[int], stream: str, device: torch.device, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Return standard normal noise (B, *shape), row ``i`` drawn from ``seeds[i]`` on the CPU."""
    rows = [torch.randn(tuple(shape), generator=g, dtype=dtype) for g in row_generators(seeds, stream)]
    return torch.stack(rows).to(device)


def rand_rows(seeds: Tensor, stream: str, device: torch.device) -> Tensor:
    """Return uniform numbers in [0, 1), (B,) float32, row ``i`` drawn from ``seeds[i]``."""
    return torch.cat([torch.rand(1, generator=g) for g in row_generators(seeds, stream)]).to(device)
