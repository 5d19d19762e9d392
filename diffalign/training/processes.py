"""The processes of a run, seen through accelerate: sums, exchanges and barriers, and nothing else."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object
from torch import Tensor
from torch.distributed.tensor import DTensor

from diffalign.errors import RunStopped, UserError

T = TypeVar("T")

_DATA_PARALLEL = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
}


class Processes:
    """Processes started by ``accelerate launch`` or ``torchrun``, with examples of their own; one needs neither.

    The network is not wrapped for data-parallel ones. A wrapper reduces gradients inside backward, which needs every
    process to run backward and every parameter to take part; here a process may hold no example of the last update of
    an epoch, and pieces run under different adapters. So gradients are summed once an update, after the last backward
    (:func:`sum_gradients`), which also keeps the number of exchanges at one however many micro-batches there are.

    Where accelerate is asked for FSDP2, the network's weights are kept in shards (:mod:`diffalign.training.sharding`).

    Args:
        may_shard: whether the caller can work with a network in shards.

    Raises:
        UserError: for launch configurations that are not supported (FSDP1, DeepSpeed, tensor parallelism, ...).
    """

    def __init__(self, may_shard: bool = False) -> None:
        self._sharding = _asked_for_shards(may_shard)
        # main-process work between barriers (saving, first downloads) may take long: wait rather than give up
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=3))
        self._accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])
        kind = self._accelerator.distributed_type
        if kind not in _DATA_PARALLEL and not (self._sharding and kind is DistributedType.FSDP):
            raise _unsupported(kind.value)

    @property
    def rank(self) -> int:
        """Place of this process."""
        return self._accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._accelerator.num_processes

    @property
    def shards(self) -> int:
        """Number of processes that a network's weights are divided among; 1 where every process holds all of them."""
        return self.world_size if self._sharding else 1

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self._accelerator.is_main_process

    @property
    def device(self) -> torch.device:
        """Device of this process."""
        return self._accelerator.device

    def sum(self, value: Tensor) -> Tensor:
        """Sum a tensor over all processes."""
        if self.world_size == 1:
            return value
        device = value.device
        return self._accelerator.reduce(value.to(self.device), "sum").to(device)

    def table(self, row: list[float]) -> list[list[float]]:
        """Give every process the numbers of all, one row a process."""
        if self.world_size == 1:
            return [row]
        values = torch.zeros(self.world_size, len(row), device=self.device)
        values[self.rank] = torch.tensor(row, device=self.device)
        return self.sum(values).tolist()

    def exchange(self, value: T) -> list[T]:
        """Give every process the objects of all, in the order of ranks; they are pickled."""
        return [value] if self.world_size == 1 else gather_object([value])

    def lend(self, value: T | None) -> T:
        """Give every process the object of the first process that has one, its tensors on the process's own device."""
        here = "cpu" if self.device.type == "cpu" else self.device  # torch.load knows no "cpu:0"
        packed = io.BytesIO()
        torch.save(value, packed)
        for content in self.exchange(packed.getvalue()):
            lent = torch.load(io.BytesIO(content), map_location=here, weights_only=False)
            if lent is not None:
                return lent
        raise ValueError("no process has anything to lend")

    def together(self, work: Callable[[], T]) -> list[T]:
        """Let every process do its part of something that can fail.

        Returns:
            the results of all, in the order of ranks.

        Raises:
            UserError: on every process, so that none waits for one that has ended; :class:`RunStopped` where that is
                what ended it. A process that failed otherwise raises its own exception.
        """
        result, failure, complaint = None, None, None
        try:
            result = work()
        except Exception as error:
            failure = error
            own = isinstance(error, UserError)
            text = str(error) if own else f"process {self.rank} failed with {type(error).__name__}: {error}"
            complaint = (RunStopped if isinstance(error, RunStopped) else UserError, text)
        answers = self.exchange((result, complaint))
        if failure is not None:
            raise failure
        for _, other in answers:
            if other is not None:
                kind, text = other
                raise kind(text)
        return [answer for answer, _ in answers]  # type: ignore[misc]

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Let the main process alone do something that can fail.

        Returns:
            the result on the main process, None on the others.

        Raises:
            UserError: on every process, as :meth:`together` does.
        """
        results: list[T] = []
        self.together(lambda: results.append(work()) if self.is_main else None)
        return results[0] if results else None

    def wait(self) -> None:
        """Wait for all processes."""
        self._accelerator.wait_for_everyone()

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """Let the main process go first, so that the others find what it has put into caches."""
        with self._accelerator.main_process_first():
            yield


def sum_gradients(parameters: list[torch.nn.Parameter], processes: Processes, bucket_elements: int = 2**24) -> None:
    """Replace gradients by their sums over all processes; parameters without a gradient anywhere keep none.

    Gradients of weights in shards have been summed during backward.

    Args:
        parameters: the same ones in the same order on every process.
        processes: whom to sum over.
        bucket_elements: numbers in one exchange; bounds the memory of the flattened copy.
    """
    parameters = [p for p in parameters if not isinstance(p, DTensor)]
    if processes.world_size == 1 or not parameters:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=processes.device)
    anywhere = processes.sum(used).tolist()
    active = [p for p, count in zip(parameters, anywhere, strict=True) if count]
    for bucket in _buckets(active, bucket_elements):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        for p, total in zip(bucket, processes.sum(flat).split([p.numel() for p in bucket]), strict=True):
            p.grad = total.view_as(p).clone()


def _asked_for_shards(may_shard: bool) -> bool:
    """Say whether accelerate was launched for FSDP2; refuse what shards in other ways, before any of it starts.

    Accelerate itself goes by these variables, but on CPUs it leaves out FSDP without a word.
    """

    def asked_for(name: str) -> bool:
        return os.environ.get(name, "").lower() == "true"

    for what, name in (("DEEPSPEED", "DeepSpeed"), ("MEGATRON_LM", "Megatron-LM"), ("PARALLELISM_CONFIG", "meshes")):
        if asked_for(f"ACCELERATE_USE_{what}"):
            raise _unsupported(name)
    if not asked_for("ACCELERATE_USE_FSDP"):
        return False
    if not may_shard:
        raise UserError(
            "accelerate is configured for FSDP, which is for training: pass --multi_gpu to accelerate launch"
        )
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise _unsupported("FSDP1")
    if asked_for("FSDP_ACTIVATION_CHECKPOINTING"):
        raise UserError("leave out accelerate's --fsdp_activation_checkpointing: use --gradient_checkpointing true")
    if asked_for("FSDP_OFFLOAD_PARAMS"):
        raise UserError("leave out accelerate's --fsdp_offload_params: shards stay on their device")
    # or else transformers loads weights on the main process alone, text encoders too
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return True


def _unsupported(what: str) -> UserError:
    return UserError(
        f"accelerate is configured for {what}, which is not supported: pass --use_fsdp --fsdp_version 2 to accelerate "
        "launch to keep weights, gradients and optimizer in shards, or --multi_gpu to run data-parallel"
    )


def _buckets(parameters: list[torch.nn.Parameter], elements: int) -> Iterator[list[torch.nn.Parameter]]:
    bucket: list[torch.nn.Parameter] = []
    size = 0
    for p in parameters:
        if bucket and (size + p.numel() > elements or p.dtype != bucket[0].dtype):
            yield bucket
            bucket, size = [], 0
        bucket.append(p)
        size += p.numel()
    if bucket:
        yield bucket
