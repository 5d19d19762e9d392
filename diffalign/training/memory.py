"""How much memory a run needs, before it starts and after it did not fit."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from diffalign.errors import UserError
from diffalign.rewards.identity import networks
from diffalign.strategies.base import Context

_MOMENT_BYTES = {"adamw": 8.0, "adamw8bit": 2.0, "adafactor": 0.1, "sgd": 0.0}
"""Optimizer state for each trained number; Adafactor keeps a row and a column for each matrix."""
_GIB = 2**30


@dataclass(frozen=True)
class Networks:
    """All networks of a run.

    Args:
        own: the one under training, adapters included.
        reference: a frozen copy of it, if there is one.
        others: VAE, text encoders, rewards.
    """

    own: nn.Module
    reference: nn.Module | None = None
    others: Sequence[nn.Module] = ()

    @classmethod
    def of(cls, ctx: Context) -> Networks:
        """Collect the networks that a method sees."""
        own, reference = ctx.policy.module, ctx.reference.network if ctx.reference is not None else None
        judges = [network for reward in ctx.rewards.values() for network in networks(reward)]
        return cls(own, None if reference is own else reference, [*ctx.policy.companions, *judges])

    @property
    def device(self) -> torch.device:
        """Where the network under training is; what lies elsewhere costs nothing there."""
        return next(self.own.parameters()).device

    def bytes_of(self, network: nn.Module | None) -> int:
        """Bytes of a network's weights on that device."""
        weights = network.parameters() if network is not None else ()
        return sum(p.numel() * p.element_size() for p in weights if p.device == self.device)


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device.

    Args:
        parameters: weights of the network, frozen and trained.
        reference: weights of a frozen copy there.
        others: weights of VAE, text encoders and rewards there.
        gradients: of the trained weights.
        optimizer: its moments, and a moving average.
        activations: saved for backward by the rows of one pass.
    """

    parameters: int
    reference: int
    others: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self.parts().values())

    @property
    def largest(self) -> str:
        """Name of the biggest consumer."""
        return max(self.parts(), key=lambda name: self.parts()[name])

    def parts(self) -> dict[str, int]:
        """Bytes by consumer."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def lines(self) -> list[str]:
        """A table for people."""
        rows = [f"  {name:<12} {size / _GIB:8.3f} GiB" for name, size in self.parts().items()]
        return ["estimated memory of one device:", *rows, f"  {'total':<12} {self.total / _GIB:8.3f} GiB"]


Activity = Literal["activations", "sampling", "validation"]
"""What needs memory for a while: a pass with a graph, images that a method samples, images that are looked at."""

_ADVICE = {
    "parameters": "load the frozen weights in half precision (--mixed_precision bf16)",
    "reference": (
        "train adapters, which need no copy (--train_mode lora), remember its values (--pinned_draws), or have it "
        "computed on the processor, slowly (--reference_device cpu)"
    ),
    "others": (
        "load VAE and text encoders in half precision (--mixed_precision bf16), encode all captions ahead "
        "(--cache_latents true), or judge by smaller rewards"
    ),
    "gradients": "train adapters instead of all weights (--train_mode lora)",
    "optimizer": "train adapters (--train_mode lora) or choose --optimizer adamw8bit or adafactor",
    "activations": (
        "set --gradient_checkpointing true, or lower --max_rows_per_forward (exact, one more forward pass), "
        "--train_batch_size or --resolution; the rank of the adapters hardly matters"
    ),
    "sampling": "lower --rollout_batch_size (where the method has it), --train_batch_size or --resolution",
    "validation": "lower --num_validation_images or --evaluation_prompts",
}


def estimate(
    held: Networks, trained: int, config: Mapping[str, Any], activations_of_a_row: int, rows: int, shards: int = 1
) -> MemoryEstimate:
    """Estimate the memory of a run.

    Args:
        held: the networks, where they will be while training.
        trained: number of trained numbers.
        config: all options under their outside names.
        activations_of_a_row: bytes that one row saves for backward (see :func:`saved_bytes`).
        rows: rows of one pass with a graph.
        shards: processes that share one copy of weights, gradients and moments; the block that is held whole while it
            runs is left out.
    """
    trained = -(-trained // shards)
    moments = _MOMENT_BYTES[config["optimizer"]] + (4.0 if config["use_ema"] else 0.0)
    return MemoryEstimate(
        parameters=held.bytes_of(held.own) // shards,
        reference=held.bytes_of(held.reference) // shards,
        others=sum(held.bytes_of(network) for network in held.others),
        gradients=4 * trained,
        optimizer=int(moments * trained),
        activations=activations_of_a_row * rows,
    )


def refuse_if_too_large(needed: MemoryEstimate, device: torch.device) -> tuple[str, ...]:
    """Refuse a run that cannot fit, by what is known exactly; activations are an estimate.

    Returns:
        a warning where the run may not fit; nothing where it will.

    Raises:
        UserError: naming the biggest consumer and the option that shrinks it.
    """
    available = device_memory(device)
    if not available or needed.total <= available:
        return ()
    told = (
        f"this run needs about {needed.total / _GIB:.1f} GiB, {device} has {available / _GIB:.1f} GiB. The biggest "
        f"part is {needed.largest} ({needed.parts()[needed.largest] / _GIB:.1f} GiB): {_ADVICE[needed.largest]}"
    )
    if needed.total - needed.activations > available:
        raise UserError(told)
    return (f"warning: it may not fit, as {told}",)


def device_memory(device: torch.device) -> int:
    """Bytes of memory a device has; 0 where that is not known."""
    import os

    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 0


def out_of_memory(
    activity: Activity, held: Networks, trained: int, config: Mapping[str, Any], shards: int = 1
) -> UserError:
    """Build the error for what did not fit: what takes most, and what shrinks it.

    Args:
        activity: what was going on.
        held, trained, config, shards: as of :func:`estimate`.
    """
    known = estimate(held, trained, config, 0, 0, shards)
    parts = {**known.parts(), activity: max(0, device_memory(held.device) - known.total)}
    largest = max(parts, key=lambda name: parts[name])
    return UserError(
        f"out of memory on {held.device}: most of it goes to {largest}, about {parts[largest] / _GIB:.1f} GiB; "
        f"{_ADVICE[largest]}. --dry_run estimates a run without starting it"
    )


def saved_bytes(module: nn.Module, call: Callable[[nn.Module], Tensor]) -> int:
    """Count the bytes that a forward pass saves for backward, without computing it.

    The pass runs on a copy of the network whose weights have shapes but no values, and with fused attention. It knows
    no automatic mixed precision, which keeps half-precision copies of float32 inputs instead: full fine-tuning is
    counted too high there.

    Args:
        module: the network.
        call: runs the copy on inputs of the "meta" device and returns its output.
    """
    memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in module.parameters()}
    memo |= {id(b): b.to("meta") for b in module.buffers()}  # type: ignore[misc]
    ghost = copy.deepcopy(module, memo)
    own = {value.untyped_storage()._cdata for value in [*ghost.parameters(), *ghost.buffers()]}
    seen: dict[int, int] = {}
    kept: list[Tensor] = []  # storages must live, or their addresses are used again

    def save(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage._cdata not in own and storage._cdata not in seen:
            seen[storage._cdata] = storage.nbytes()
            kept.append(value)
        return value

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(save, lambda value: value), _FusedKernels():
        call(ghost)
    return sum(seen.values())


class _FusedAttention(torch.autograd.Function):
    """Attention without values, which saves what fused kernels save: inputs, output, and a number for each row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # tokens before heads, as the kernels write it, so that layers go on with a view
        *rows, heads, tokens, _ = query.shape
        output = query.new_empty(*rows, tokens, heads, value.shape[-1]).transpose(-3, -2)
        ctx.save_for_backward(query, key, value, output, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise RuntimeError("this attention has shapes and no values: nothing can be computed of it")


class _FusedKernels(TorchFunctionMode):
    """Puts fused attention in place of torch's, which on tensors without values is written out, scores and all."""

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        attends = function is F.scaled_dot_product_attention
        return (_attend if attends else function)(*args, **(kwargs or {}))


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
    return _FusedAttention.apply(query, key, value)  # type: ignore[no-untyped-call]
