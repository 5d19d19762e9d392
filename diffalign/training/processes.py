"""The processes of a run, seen through accelerate: sums, exchanges and barriers, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs, gather_object
from torch import Tensor

from diffalign.errors import UserError

T = TypeVar("T")

_DATA_PARALLEL = {
    DistributedType.NO,
    DistributedType.MULTI_CPU,
    DistributedType.MULTI_GPU,
    DistributedType.MULTI_NPU,
    DistributedType.MULTI_XPU,
}


class Processes:
    """Data-parallel processes started by ``accelerate launch`` or ``torchrun``; one process needs neither.

    The network is not wrapped for them. A wrapper reduces gradients inside backward, which needs every process to run
    backward and every parameter to take part; here a process may hold no example of the last update of an epoch, and
    pieces run under different adapters. So gradients are summed once an update, after the last backward
    (:func:`sum_gradients`), which also keeps the number of exchanges at one however many micro-batches there are.

    Raises:
        UserError: for launch configurations that shard the network (FSDP, DeepSpeed, ...).
    """

    def __init__(self) -> None:
        # main-process work between barriers (saving, first downloads) may take long: wait rather than give up
        patience = InitProcessGroupKwargs(timeout=timedelta(hours=3))
        self._accelerator = Accelerator(cpu=not torch.accelerator.is_available(), kwargs_handlers=[patience])
        kind = self._accelerator.distributed_type
        if kind not in _DATA_PARALLEL:
            raise UserError(
                f"accelerate is configured for {kind.value}; diffalign runs on one process or data-parallel ones: "
                "choose multi-GPU or multi-CPU with `accelerate config`, or pass --multi_gpu to accelerate launch"
            )

    @property
    def rank(self) -> int:
        """Place of this process."""
        return self._accelerator.process_index

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self._accelerator.num_processes

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
        """Give every process the objects of all, in the order of ranks; for rare use."""
        return [value] if self.world_size == 1 else gather_object([value])

    def on_main(self, work: Callable[[], T]) -> T | None:
        """Let the main process alone do something that a user's mistake can end.

        Returns:
            the result on the main process, None on the others.

        Raises:
            UserError: on every process, so that none waits for one that has ended.
        """
        result, failure = None, None
        if self.is_main:
            try:
                result = work()
            except UserError as error:
                failure = error
        complaint = self.exchange(str(failure) if failure else "")[0]
        if failure is not None:
            raise failure
        if complaint:
            raise UserError(complaint)
        return result

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

    Args:
        parameters: the same ones in the same order on every process.
        processes: whom to sum over.
        bucket_elements: numbers in one exchange; bounds the memory of the flattened copy.
    """
    if processes.world_size == 1:
        return
    used = torch.tensor([float(p.grad is not None) for p in parameters], device=processes.device)
    anywhere = processes.sum(used).tolist()
    active = [p for p, count in zip(parameters, anywhere, strict=True) if count]
    for bucket in _buckets(active, bucket_elements):
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in bucket])
        for p, total in zip(bucket, processes.sum(flat).split([p.numel() for p in bucket]), strict=True):
            p.grad = total.view_as(p).clone()


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
