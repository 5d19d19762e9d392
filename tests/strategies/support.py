"""Small makers for tests of strategies: terms from numbers, batches without latents, one whole step on a policy."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.policies.base import Policy
from diffalign.references import AdaptersOff
from diffalign.strategies.base import Context, LossOutput, Piece, Strategy, Terms
from tests.factories import ToyPolicy, image_batch


def numbers(*shape: int, seed: int = 0, low: float = 0.05, high: float = 0.3) -> Tensor:
    """Uniform float64 numbers of the size of denoising errors."""
    generator = torch.Generator().manual_seed(seed)
    return low + (high - low) * torch.rand(shape, generator=generator, dtype=torch.float64)


def terms(policy: Tensor, reference: Tensor | None = None, **frozen: Tensor) -> Terms:
    """Make terms of one column from values (rows,)."""
    columns = {name: value[:, None] for name, value in frozen.items()}
    if reference is not None:
        columns["reference"] = reference[:, None]
    return Terms(policy[:, None], columns)


def examples(size: int, **fields: Tensor) -> ImageBatch:
    """Make a batch that has fields only."""
    return ImageBatch([f"example-{i}" for i in range(size)], torch.arange(size), fields=fields)


def objective(strategy: Strategy, values: Terms, batch: ImageBatch) -> LossOutput:
    """Evaluate a strategy's loss of terms as the loop does in one process."""
    plain = Terms(values.policy.detach(), values.frozen)
    return strategy.loss(values, strategy.statistics(plain, lambda total: total), batch)


def context(policy: Policy, with_reference: bool = True, **options: Any) -> Context:
    """Make a context whose reference is the policy without its adapter."""
    return Context(policy, AdaptersOff(policy) if with_reference else None, **options)


def moved_policy(process: str = "epsilon", delta: tuple[float, float] = (0.05, -0.04)) -> ToyPolicy:
    """Make a toy policy whose adapter is no longer zero."""
    policy = ToyPolicy(process)
    policy.module.delta["default"].data.copy_(torch.tensor(delta))
    return policy


def step(strategy: Strategy, ctx: Context, batch: ImageBatch) -> tuple[Terms, LossOutput]:
    """Run the hooks of one micro-batch in the loop's order."""
    draws = strategy.draw(ctx, batch)
    frozen = strategy.frozen(ctx, batch, draws, Piece())
    values = Terms(strategy.terms(ctx, batch, draws, Piece()), frozen)
    return values, objective(strategy, values, batch)


__all__ = ["context", "examples", "image_batch", "moved_policy", "numbers", "objective", "step", "terms"]
