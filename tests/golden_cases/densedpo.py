"""DenseDPO through the pair kernel: errors apart by frame, segments weighed by their labels."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.strategies.base import Context, Piece, Terms
from diffalign.strategies.densedpo import segment_pair_loss
from diffalign.strategies.pair_kernel import DenoisingKernel, Noised
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.scripted import ScriptedPolicy, ScriptedReference, scripted_batch

VIDEOS = ("velocity_pred", "ref_velocity", "target")


def run(case: GoldenCase) -> dict[str, object]:
    names = {f"{name}_{video}" for name in VIDEOS for video in (0, 1)}
    case.known(names | {"segment_labels", "frame_to_segment"}, {"beta": None, "aggregation": {"inside", "outside"}})
    first, second = (case.tensor(f"velocity_pred_{video}").requires_grad_() for video in (0, 1))
    ref_pred, target = (_stack(case.tensor(f"{name}_0"), case.tensor(f"{name}_1")) for name in VIDEOS[1:])
    policy = ScriptedPolicy(lambda *_: _stack(first, second))
    ctx = Context(policy, ScriptedReference(ScriptedPolicy(lambda *_: ref_pred)))  # type: ignore[arg-type]
    batch = scripted_batch(torch.zeros_like(target))
    draws = Noised(batch.latents, torch.zeros(len(target)), target, batch.condition)
    kernel = DenoisingKernel(frame_dim=2)
    terms = Terms(kernel.terms(ctx, batch, draws, Piece()), kernel.frozen(ctx, batch, draws, Piece()))
    output = segment_pair_loss(
        terms,
        case.integers("segment_labels"),
        case.integers("frame_to_segment"),
        case.params["beta"],
        case.params["aggregation"],
    )
    gradients = torch.autograd.grad(output.loss, (first, second))
    return {"loss": output.loss, "grad_velocity_pred_0": gradients[0], "grad_velocity_pred_1": gradients[1]}


def _stack(first: Tensor, second: Tensor) -> Tensor:
    """Rows of (batch, frames, channels, ...) videos, as the product has them: (2 B, channels, frames, ...)."""
    return torch.cat([first, second]).transpose(1, 2)
