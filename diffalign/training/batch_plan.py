"""How the examples of an optimizer step are shared out among micro-batches and processes."""

from __future__ import annotations

from dataclasses import dataclass

from diffalign.errors import UserError
from diffalign.training.config import OptimOptions, require


@dataclass(frozen=True)
class BatchPlan:
    """How examples make up one optimizer step: ``micro * accumulation * world_size == global_batch``."""

    micro: int
    accumulation: int
    world_size: int

    @property
    def global_batch(self) -> int:
        """Examples in one optimizer step over all processes."""
        return self.micro * self.accumulation * self.world_size

    @property
    def equation(self) -> str:
        """The plan as a line for the run's header."""
        return (
            f"global batch {self.global_batch} = micro batch {self.micro} x accumulation {self.accumulation}"
            f" x {self.world_size} process{'es' if self.world_size > 1 else ''}"
        )


def plan_batches(optim: OptimOptions, world_size: int) -> BatchPlan:
    """Derive the missing one of global batch, micro batch and accumulation.

    Raises:
        UserError: if the three contradict each other for this number of processes.
    """
    micro, accumulation, total = optim.train_batch_size, optim.gradient_accumulation_steps, optim.global_batch_pairs
    if not total:
        return BatchPlan(micro, max(accumulation, 1), world_size)
    if accumulation:
        require(
            micro * accumulation * world_size == total,
            f"--train_batch_size {micro} x --gradient_accumulation_steps {accumulation} x {world_size} process(es) is "
            f"{micro * accumulation * world_size}, not --global_batch_pairs {total}: leave one of them out",
        )
        return BatchPlan(micro, accumulation, world_size)
    if total % world_size:
        raise UserError(f"--global_batch_pairs {total} cannot be shared evenly by {world_size} processes")
    share = total // world_size
    micro = min(micro, share)
    require(
        share % micro == 0,
        f"--global_batch_pairs {total} over {world_size} process(es) leaves {share} examples each, which is no "
        f"multiple of --train_batch_size {micro}",
    )
    return BatchPlan(micro, share // micro, world_size)
