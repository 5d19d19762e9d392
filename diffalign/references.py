"""Where frozen values come from: adapters switched off, a named adapter, a frozen copy, or a cache of any of them.

A reference is the *start* of training: the base where training starts from it, else the adapter it starts from.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from diffalign.errors import UserError
from diffalign.policies.adapters import DEFAULT_ADAPTER, START_ADAPTER, LoraSettings
from diffalign.policies.base import BasePolicy

Compute = Callable[..., Tensor]
"""Takes a policy and returns (rows, K)."""


class Reference(ABC):
    """A frozen policy, for values without a gradient.

    Args:
        policy: the policy under training, or a frozen copy of it.
    """

    def __init__(self, policy: BasePolicy) -> None:
        self._policy = policy

    @property
    @abstractmethod
    def identity(self) -> str:
        """What the reference is, for checkpoints: "base:HASH", "adapter:NAME:HASH" or "copy:HASH"."""

    @property
    def device(self) -> torch.device:
        """Where values come out."""
        return self._policy.device

    @property
    def network(self) -> nn.Module:
        """The network that answers: the policy's own, or a copy."""
        return self._policy.module

    @abstractmethod
    def _held(self) -> AbstractContextManager[Any]:
        """Give the policy in the state of the reference while the block lasts."""

    @contextmanager
    def active(self) -> Iterator[Any]:
        """Give the policy in the state of the reference, without gradient, while the block lasts.

        For what is no row of numbers: samples, paths, predictions. Nothing of it is remembered.
        """
        with torch.no_grad(), self._held() as policy:
            yield policy

    def evaluate(self, compute: Compute, keys: Sequence[str] | None = None) -> Tensor:
        """Evaluate ``compute(policy)`` under the reference, without gradient.

        Args:
            compute: maps a policy to (rows, K).
            keys: one a row where the value depends on nothing but the key; a cache may then answer instead.
        """
        with self.active() as policy:
            return compute(policy)

    def share(self) -> None:  # noqa: B027 - nothing to share where nothing is remembered
        """Let all processes know what each has learnt; they call it together, after every update."""

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must carry so that a resumed run is given the same values to the bit: remembered ones."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if state:
            raise UserError("the checkpoint was made with --pinned_draws, which this run lacks")


class AdaptersOff(Reference):
    """The base network: the policy with its adapters switched off. No second copy of the weights."""

    @cached_property
    def identity(self) -> str:  # type: ignore[override]
        return f"base:{self._policy.fingerprint()}"

    @contextmanager
    def _held(self) -> Iterator[Any]:
        with self._policy.adapters.disabled():
            yield self._policy


class NamedAdapter(Reference):
    """A frozen adapter of the bank: the start of training where that was itself a fine-tuned adapter."""

    def __init__(self, policy: BasePolicy, name: str) -> None:
        super().__init__(policy)
        self._name = name

    @property
    def identity(self) -> str:
        return f"adapter:{self._name}:{self._policy.adapters.fingerprint(self._name)}"

    @contextmanager
    def _held(self) -> Iterator[Any]:
        with self._policy.adapters.using(self._name):
            yield self._policy


class FrozenCopy(Reference):
    """A frozen copy for full fine-tuning; it may live on another device, or take half the memory.

    Inputs are moved to where the copy is and its outputs back to where the policy is, tensor by tensor.

    Args:
        policy: the policy, before training.
        device: where the copy is kept; by default as the policy.
        mixed_precision: type of the run's autocast. The weights that autocast would round at each use are then kept
            rounded, and only those: the copy computes in mixed precision what the policy computed at the start, to the
            bit.
    """

    def __init__(
        self, policy: BasePolicy, device: torch.device | None = None, mixed_precision: torch.dtype | None = None
    ) -> None:
        self._identity = f"copy:{policy.fingerprint()}"
        module = copy.deepcopy(policy.module).to(device=device).requires_grad_(False).eval()
        if mixed_precision is not None:
            _round_as_autocast(module, mixed_precision)
        home, away = policy.device, next(module.parameters()).device
        if home != away:
            _move_traffic(module, away, home)
        super().__init__(policy.with_module(module, home, policy.dtype))
        self._mixed_precision = mixed_precision

    @property
    def identity(self) -> str:
        return self._identity

    @contextmanager
    def _held(self) -> Iterator[Any]:
        mixed = self._mixed_precision
        with nullcontext() if mixed is None else torch.autocast(self.device.type, dtype=mixed):
            yield self._policy


class CachedReference(Reference):
    """Remembers the values of another reference by key, in memory: less than 1 kB for a row of one value.

    An example comes to another process in each epoch, so every process remembers the values of all.
    Rows of different length (text) come back padded on the right with zeros, to the longest of those asked for.
    Sound only while noise and timesteps are pinned to examples and the reference stands still.

    Args:
        inner: the reference whose values are remembered.
        exchange: gives every process the objects of all (``Processes.exchange``); by default there is one process.
    """

    def __init__(self, inner: Reference, exchange: Callable[[Any], list[Any]] = lambda value: [value]) -> None:
        super().__init__(inner._policy)
        self._inner = inner
        self._exchange = exchange
        self._values: dict[str, Tensor] = {}
        self._fresh: list[str] = []

    @property
    def identity(self) -> str:
        return self._inner.identity

    @property
    def device(self) -> torch.device:
        return self._inner.device

    def __len__(self) -> int:
        return len(self._values)

    def _held(self) -> AbstractContextManager[Any]:
        return self._inner._held()

    def evaluate(self, compute: Compute, keys: Sequence[str] | None = None) -> Tensor:
        if keys is None:
            return self._inner.evaluate(compute)
        if not all(key in self._values for key in keys):
            values = self._inner.evaluate(compute)
            self._values.update(zip(keys, values.cpu(), strict=True))
            self._fresh += keys
            return values
        return pad_sequence([self._values[key] for key in keys], batch_first=True).to(self.device)

    def share(self) -> None:
        """Learn the values that other processes have computed since the last call."""
        for part in self._exchange(self._packed(self._fresh)):
            self._values.update(zip(part["keys"], part["values"], strict=True))
        self._fresh = []

    def state_dict(self) -> dict[str, Any]:
        """All values. Made again after a resume, in other batches, they could differ in the last bit."""
        return self._packed(list(self._values))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if not state:
            raise UserError("the checkpoint was made without --pinned_draws, which this run asks for")
        self._values = dict(zip(state["keys"], state["values"], strict=True))

    def _packed(self, keys: list[str]) -> dict[str, Any]:
        values = pad_sequence([self._values[key] for key in keys], batch_first=True) if keys else torch.empty(0)
        return {"keys": keys, "values": values}


def start_lora(policy: BasePolicy, settings: LoraSettings | None = None, seed: int = 0) -> Reference:
    """Give the policy the adapter that a run trains, and return the start of training as its reference.

    A policy loaded with an adapter (``START_ADAPTER``) continues from it: the new adapter takes its weights, and with
    them its rank, scale and targets; only dropout and trainability are new.

    Args:
        policy: without the adapter "default".
        settings: shape of a fresh adapter.
        seed: of its initial values.
    """
    bank, settings = policy.adapters, settings or LoraSettings()
    if START_ADAPTER not in bank.names:
        bank.add(DEFAULT_ADAPTER, settings, seed=seed)
        return AdaptersOff(policy)
    bank.add(DEFAULT_ADAPTER, replace(bank.settings(START_ADAPTER), dropout=settings.dropout), seed=seed)
    bank.copy(START_ADAPTER, DEFAULT_ADAPTER)
    bank.activate(DEFAULT_ADAPTER)
    return NamedAdapter(policy, START_ADAPTER)


def start_full(
    policy: BasePolicy, device: torch.device | None = None, mixed_precision: torch.dtype | None = None
) -> FrozenCopy:
    """Make all weights of the policy trainable, and return a frozen copy of them as they are.

    Args:
        policy: without adapters.
        device, mixed_precision: where and how the copy is kept, see :class:`FrozenCopy`.

    Raises:
        UserError: if the policy has adapters.
    """
    policy.train_weights()
    return FrozenCopy(policy, device, mixed_precision)


_ROUNDED = (nn.Linear, nn.modules.conv._ConvNd)
"""Layers whose weights autocast rounds to half precision; norms and embeddings compute with theirs as they are."""


def _round_as_autocast(module: nn.Module, dtype: torch.dtype) -> None:
    """Round the weights of matrix products and convolutions in place, but for those that other layers share."""
    layers = list(module.modules())
    kept = {id(p) for layer in layers if not isinstance(layer, _ROUNDED) for p in layer.parameters(recurse=False)}
    for layer in layers:
        for parameter in layer.parameters(recurse=False):
            if id(parameter) not in kept:
                parameter.data = parameter.data.to(dtype)


def _move_traffic(module: nn.Module, away: torch.device, home: torch.device) -> None:
    def before(module: nn.Module, args: Any, kwargs: Any) -> Any:
        return _moved(args, away), _moved(kwargs, away)

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        return _moved(output, home)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, (tuple, list)):
        return type(value)(_moved(entry, device) for entry in value)
    if isinstance(value, dict):  # model outputs are dictionaries too: keep their class
        moved = copy.copy(value)
        for key in value:
            moved[key] = _moved(value[key], device)
        return moved
    return value
