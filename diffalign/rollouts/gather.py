"""Statistics over groups that several processes share: every process sees the values of all."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.strategies.base import Reduce


def gather_rows(values: Tensor, rank: int, world_size: int, reduce: Reduce) -> tuple[Tensor, slice]:
    """Join rows of all processes, in the order of their ranks.

    Args:
        values: (n, ...) of this process; n may differ between processes. Integers arrive unchanged.
        rank, world_size: place among the processes.
        reduce: sum over processes.

    Returns:
        the rows of all processes, the same on each, and where this process's own are.
    """
    counts = torch.zeros(world_size, dtype=torch.long, device=values.device)
    counts[rank] = len(values)
    sizes = reduce(counts).tolist()
    own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    joined = values.new_zeros(sum(sizes), *values.shape[1:])
    joined[own] = values
    return reduce(joined), own
