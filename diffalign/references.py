"""Where frozen values come from: adapters switched off, a named adapter, a frozen copy, or a cache of any of them."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from diffalign.policies.base import BasePolicy

Compute = Callable[..., Tensor]
"""Takes a policy and returns (rows, K)."""


class Reference(ABC):
    """A frozen policy that values are asked of."""

    @property
    @abstractmethod
    def identity(self) -> str:
        """What the reference is, for checkpoints: "base", "adapter:NAME:HASH" or "copy:HASH"."""

    @abstractmethod
    def _compute(self, compute: Compute) -> Tensor: ...

    def evaluate(self, compute: Compute, keys: Sequence[str] | None = None) -> Tensor:
        """Evaluate ``compute(policy)`` under the reference, without gradient.

        Args:
            compute: maps a policy to (rows, K).
            keys: one a row where the value depends on nothing but the key; a cache may then answer instead.
        """
        with torch.no_grad():
            return self._compute(compute)


class AdaptersOff(Reference):
    """The base network: the policy with its adapters switched off. No second copy of the weights."""

    identity = "base"

    def __init__(self, policy: BasePolicy) -> None:
        self._policy = policy

    def _compute(self, compute: Compute) -> Tensor:
        with self._policy.adapters.disabled():
            return compute(self._policy)


class NamedAdapter(Reference):
    """A frozen adapter of the bank: the start of training where that was itself a fine-tuned adapter."""

    def __init__(self, policy: BasePolicy, name: str) -> None:
        self._policy, self._name = policy, name

    @property
    def identity(self) -> str:
        return f"adapter:{self._name}:{self._policy.adapters.fingerprint(self._name)}"

    def _compute(self, compute: Compute) -> Tensor:
        with self._policy.adapters.using(self._name):
            return compute(self._policy)


class FrozenCopy(Reference):
    """A frozen copy for full fine-tuning; it may live on another device, or in lower precision.

    Args:
        policy: the policy, before training.
        device, dtype: where and how the copy is kept; by default as the policy.
    """

    def __init__(
        self, policy: BasePolicy, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> None:
        module = copy.deepcopy(policy.module).to(device=device, dtype=dtype).requires_grad_(False).eval()
        self._policy = policy.with_module(module)

    identity = "copy"

    def _compute(self, compute: Compute) -> Tensor:
        return compute(self._policy)


class CachedReference(Reference):
    """Remembers the values of another reference by key, in memory: 4 bytes a value.

    Sound only while noise and timesteps are pinned to examples and the reference stands still.
    """

    def __init__(self, inner: Reference) -> None:
        self._inner = inner
        self._values: dict[str, Tensor] = {}

    @property
    def identity(self) -> str:
        return self._inner.identity

    def _compute(self, compute: Compute) -> Tensor:
        return self._inner._compute(compute)

    def evaluate(self, compute: Compute, keys: Sequence[str] | None = None) -> Tensor:
        if keys is None:
            return self._inner.evaluate(compute)
        if not all(key in self._values for key in keys):
            values = self._inner.evaluate(compute)
            self._values.update(zip(keys, values.cpu(), strict=True))
            return values
        policy_device = self._device
        return torch.stack([self._values[key] for key in keys]).to(policy_device)

    @property
    def _device(self) -> torch.device:
        policy: BasePolicy = self._inner._policy  # type: ignore[attr-defined]
        return policy.device
