"""Which networks a reward holds, and one hash over all: the weights that a score was made with."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor, nn

from diffalign.policies.fingerprint import fingerprint
from diffalign.rewards.base import Reward


def weights_hash(reward: Reward) -> str | None:
    """Hash the weights that decide a reward's scores.

    Networks are hashed as they were loaded (their type matters: half precision has another hash), files of other
    runtimes by their content.

    Args:
        reward: the reward; wrappers are looked into.

    Returns:
        16 hexadecimal digits; None where there are no weights.
    """
    tensors: list[tuple[str, Tensor]] = []
    files: list[str] = []
    for name, part in _parts(reward, "", set()):
        if isinstance(part, Path):
            files.append(f"{name}={hashlib.sha256(part.read_bytes()).hexdigest()}")
        else:
            tensors += [(f"{name}.{inner}", value) for inner, value in part.state_dict().items()]
    return fingerprint(tensors, salt="\n".join(sorted(files))) if tensors or files else None


def networks(reward: Reward) -> list[nn.Module]:
    """Return every network that a reward holds; wrappers are looked into."""
    return [part for _, part in _parts(reward, "", set()) if isinstance(part, nn.Module)]


def _parts(owner: object, prefix: str, seen: set[int]) -> Iterator[tuple[str, nn.Module | Path]]:
    """Yield the networks and the files that an object holds, looking into rewards, towers and collections of them."""
    if id(owner) in seen:
        return
    seen.add(id(owner))
    for path in getattr(owner, "weights_files", ()):
        yield f"{prefix}{path.name}", path
    values = vars(owner).items() if hasattr(owner, "__dict__") else ()
    for name, value in values:
        inner = f"{prefix}{name}"
        held = value if isinstance(value, list | tuple) else value.values() if isinstance(value, dict) else [value]
        for place, item in enumerate(held):
            if isinstance(item, nn.Module):
                if id(item) not in seen:
                    seen.add(id(item))
                    yield f"{inner}{place}", item
            elif type(item).__module__.startswith("diffalign.rewards."):
                yield from _parts(item, f"{inner}{place}.", seen)
