"""How much memory a run needs: counted before it starts, told after it did not fit."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from diffalign.errors import UserError
from diffalign.references import start_full
from diffalign.strategies.base import Context
from diffalign.training.memory import (
    Activity,
    MemoryEstimate,
    Networks,
    estimate,
    out_of_memory,
    refuse_if_too_large,
    saved_bytes,
)
from tests.factories import Ripples, tiny_policy

CONFIG = {"train_mode": "lora", "reference_device": "same", "optimizer": "adamw", "use_ema": False}


def test_saved_bytes_count_activations_without_computing() -> None:
    module = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    got = saved_bytes(module, lambda ghost: ghost(torch.empty(5, 8, device="meta")))
    # the input of the first layer is kept for its weight's gradient, the output of ReLU for its own and the next one's
    assert got == 4 * (5 * 8 + 5 * 16)
    module.requires_grad_(False)
    assert saved_bytes(module, lambda ghost: ghost(torch.empty(5, 8, device="meta"))) == 0


def test_attention_is_counted_as_fused_kernels_save_it() -> None:
    """Queries, keys, values, the output, and a number for each query; not the scores of all tokens with all."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.project = nn.Linear(16, 48, bias=False)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.project(tokens).chunk(3, dim=-1))
            return F.scaled_dot_product_attention(q, key=k, value=v).transpose(1, 2).flatten(2)

    got = saved_bytes(Attention(), lambda ghost: ghost(torch.empty(1, 1000, 16, device="meta")))
    assert got == 4 * 1000 * (16 + 48 + 16 + 2)  # the layer's input, its output, the heads' output, and a row's number


def test_estimate_adds_up_and_refuses() -> None:
    module = nn.Linear(10, 10, bias=False)
    needed = estimate(Networks(module), 100, CONFIG, activations_of_a_row=1000, rows=4)
    assert needed == MemoryEstimate(400, 0, 0, 400, 800, 4000)
    assert needed.total == 5600
    assert needed.largest == "activations"
    half, away = nn.Linear(10, 10, bias=False).bfloat16(), nn.Linear(10, 10, device="meta")
    full = estimate(Networks(module, half, [nn.Linear(5, 1), away]), 100, {**CONFIG, "use_ema": True}, 0, 0)
    assert (full.reference, full.others, full.optimizer) == (200, 24, 1200)
    quarter = estimate(Networks(module, module), 100, CONFIG, 1000, 4, shards=4)
    assert quarter == MemoryEstimate(100, 100, 0, 100, 200, 4000)
    assert refuse_if_too_large(needed, torch.device("cpu")) == ()
    # what is estimated is told, what is known is refused
    (warning,) = refuse_if_too_large(MemoryEstimate(0, 0, 0, 0, 0, 2**60), torch.device("cpu"))
    assert re.search(r"may not fit, .*biggest part is activations .*--gradient_checkpointing", warning)
    with pytest.raises(UserError, match=r"biggest part is optimizer .*adamw8bit"):
        refuse_if_too_large(MemoryEstimate(0, 0, 0, 0, 2**60, 0), torch.device("cpu"))


def test_estimate_counts_all_networks_of_a_run() -> None:
    policy, judge = tiny_policy("sdxl"), Ripples()
    judge.network = nn.Linear(7, 1)  # type: ignore[attr-defined]
    ctx = Context(policy, start_full(policy, mixed_precision=torch.bfloat16), rewards={"judge": judge})
    needed = estimate(Networks.of(ctx), 0, CONFIG, 0, 0)
    assert needed.parameters + needed.others == sum(p.nbytes for n in policy.parts for p in n.parameters()) + 4 * 8
    assert 0.5 * needed.parameters < needed.reference < 0.55 * needed.parameters
    assert Networks.of(Context(policy)).reference is None


@pytest.mark.parametrize(
    ("activity", "advice"),
    [
        ("activations", "the rank of the adapters hardly matters"),
        ("sampling", "--rollout_batch_size"),
        ("validation", "--num_validation_images"),
    ],
)
def test_out_of_memory_names_the_biggest_consumer(activity: Activity, advice: str) -> None:
    message = str(out_of_memory(activity, Networks(nn.Linear(4, 4)), 16, CONFIG))
    assert f"most of it goes to {activity}" in message
    assert advice in message
