"""Nothing is left to decide once all noise is shared, and every step of a real sampler has a gradient."""

from __future__ import annotations

import torch

from benchmarks.step_signal import Probe, measure
from diffalign.world.grammar import prompts
from tests.factories import Ripples, tiny_policy


def test_what_a_reward_has_left_to_decide_shrinks_along_the_trajectory() -> None:
    policy = tiny_policy("sd", lora=True)
    probe = Probe(policy, Ripples(), prompts("train", 8, seed=0), images=4, steps=3, guidance_scale=1.0)
    weights = [p for name, p in policy.module.named_parameters() if p.requires_grad and "lora_B" in name]
    signals = measure(probe, weights)
    left = [signal.undecided for signal in signals] + [probe.undecided(len(signals))]
    assert left[0] > left[1] > left[2] > left[3]
    assert left[3] < 1e-12
    assert all(signal.gradient_norm > 0 and -1 <= signal.agreement <= 1 for signal in signals)
    assert torch.is_grad_enabled()
