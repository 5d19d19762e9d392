"""Networks in shards (FSDP2): every process keeps a part of each weight and borrows a block whole while it computes.

``accelerate launch --use_fsdp --fsdp_version 2`` asks for it, ``torch.distributed.fsdp.fully_shard`` does it in place:
the network stays the module it was, with the adapters and hooks that it has, and no engine stands around it.
Accelerate's own ``prepare`` is not used: it shards on accelerators only, while here CPUs (gloo) take the same path.

A weight in shards is a ``DTensor``; it is known by that type wherever that matters, so that optimizer, clipping and
moving average need no second version. Passes gather weights from all processes: these must stay in step, hence
:attr:`diffalign.strategies.base.Spec.lockstep`.

Source: FSDP2, https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from diffalign.errors import UserError
from diffalign.strategies.base import Context, Spec
from diffalign.training.config import TrainConfig


def refuse_unless_shardable(spec: Spec, config: TrainConfig) -> None:
    """Refuse what cannot work on a network in shards.

    Raises:
        UserError: with what to do instead.
    """
    optim = config.optim
    reasons = {
        f"{config.method!r} samples while it trains, each process at its own pace": spec.lockstep == "none",
        "--pinned_draws lets each process skip passes of its own": bool(config.data.pinned_draws),
        f"--optimizer {optim.optimizer} needs weights whole (choose adamw or sgd)": optim.optimizer
        in ("adafactor", "adamw8bit"),
        "--mixed_precision fp16 needs one loss scale over all shards (choose bf16)": optim.mixed_precision == "fp16",
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(
                f"a network cannot be kept in shards (--use_fsdp) here: {reason}. Leave that out, or run data-parallel "
                "processes (accelerate launch --multi_gpu)"
            )


def shard(networks: Iterable[nn.Module], device: torch.device, processes: int) -> None:
    """Shard networks in place over all processes; those on another device (an offloaded reference) stay whole.

    Blocks are those that diffusers and transformers name as not to be split (``_no_split_modules``); what lies outside
    them is a block of its own. Parameters must have been added, and moved to the device, before.
    """
    mesh = init_device_mesh(device.type, (processes,))
    for network in networks:
        if next(network.parameters()).device.type == device.type:
            _shard(network, mesh)


def _shard(network: nn.Module, mesh: DeviceMesh) -> None:
    names = set(getattr(network, "_no_split_modules", None) or ())
    blocks = [block for block in network.modules() if block is network or type(block).__name__ in names]
    for block in reversed(blocks):  # inner ones first
        unit = fully_shard(block, mesh=mesh, reshard_after_forward=True)
        # losses are divided by the examples of all processes: gradients are to be summed, not averaged
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)


def is_sharded(network: nn.Module) -> bool:
    """Say whether a network is in shards."""
    return isinstance(network, FSDPModule)


def networks_of(ctx: Context) -> list[nn.Module]:
    """Return the network under training, and the reference's where that is another one."""
    own = ctx.policy.module
    other = ctx.reference.network if ctx.reference is not None else own
    return [own] if other is own else [own, other]


@contextmanager
def gathered(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Hold networks whole, so that processes may evaluate them at their own pace, or one alone; without gradient.

    All processes enter and leave together. Does nothing for networks that are whole anyway.
    """
    roots = [network for network in networks if isinstance(network, FSDPModule)]
    blocks = [block for root in roots for block in root.modules() if isinstance(block, FSDPModule)]  # type: ignore[attr-defined]
    for block in blocks:
        block.set_reshard_after_forward(False, recurse=False)
        block.unshard()
    try:
        yield
    finally:
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)
            block.reshard()


@contextmanager
def saved_whole(network: nn.Module, keep: bool) -> Iterator[None]:
    """Hold the trained weights whole and on the CPU in place of their shards, for writing them to files.

    All processes enter and leave together; no pass may run inside. Does nothing for a network that is whole anyway.

    Args:
        network: the network.
        keep: whether this process writes; the others only help.
    """
    if not isinstance(network, FSDPModule):
        yield
        return
    sharded_class = type(network)
    places: list[tuple[nn.Module, str, nn.Parameter]] = []
    values: dict[int, nn.Parameter] = {}
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.requires_grad and isinstance(parameter, DTensor):
                if id(parameter) not in values:  # tied weights stay tied
                    values[id(parameter)] = nn.Parameter(whole(parameter.detach(), keep), requires_grad=False)
                places.append((module, name, parameter))
    try:
        for module, name, parameter in places:
            module.register_parameter(name, values[id(parameter)])
        network.__class__ = sharded_class.__bases__[1]  # files name the class that fully_shard has derived from
        yield
    finally:
        network.__class__ = sharded_class
        for module, name, parameter in places:
            module.register_parameter(name, parameter)


def whole(state: Any, keep: bool = True) -> Any:
    """Replace weights in shards by whole ones on the CPU, in a tree of mappings and sequences or in a tensor.

    All processes call it with the same tree.

    Args:
        state: anything; what is no shard stays as it is.
        keep: whether this process wants the values; the others get empty tensors, and need the memory of one at a time.
    """
    if isinstance(state, DTensor):
        full = state.full_tensor()
        return full.cpu() if keep else torch.empty(0)
    if isinstance(state, Mapping):
        return {key: whole(value, keep) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return [whole(value, keep) for value in state]
    return state


def to_host(value: Tensor) -> Tensor:
    """Copy a value to main memory; of one in shards, the part of this process, as a plain tensor."""
    local = value.to_local() if isinstance(value, DTensor) else value
    return local.detach().to("cpu", copy=True)


def from_host(value: Tensor, target: Tensor) -> Tensor:
    """Return what :func:`to_host` made of a value like the target: where that is in shards, in such on its device."""
    if not isinstance(target, DTensor):
        return value
    local, mesh = value.to(target.to_local().device), target.device_mesh
    return DTensor.from_local(
        local, mesh, target.placements, run_check=False, shape=target.shape, stride=target.stride()
    )


def like(value: Tensor, target: Tensor) -> Tensor:
    """Return a whole value in shards if the target of the same shape is; each process takes its own part of it."""
    if isinstance(target, DTensor) and not isinstance(value, DTensor):
        value = value.to(target.device)
        return distribute_tensor(value, target.device_mesh, target.placements, src_data_rank=None)
    return value
