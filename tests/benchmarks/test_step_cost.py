"""The loop adds nothing to the cost of a step: exact counts, no timings."""

from __future__ import annotations

import pytest

from benchmarks.step_cost import measure, prepare, variants
from tests.factories import tiny_sd


@pytest.fixture(scope="module")
def costs():
    policy = tiny_sd()
    batch, pixels = prepare(policy, pairs=2, rank=4)
    return {name: measure(step, policy) for name, step in variants(policy, batch, pixels).items()}


def test_a_step_costs_what_the_bare_model_costs(costs):
    assert costs["loop"].flops <= 1.05 * costs["bare"].flops
    assert costs["loop"].saved_bytes <= 1.05 * costs["bare"].saved_bytes


def test_remembered_reference_errors_save_the_reference_pass(costs):
    # one pass of three: forward, backward to the adapters' inputs, reference
    assert costs["cached"].flops < 0.8 * costs["loop"].flops


def test_the_naive_recipe_costs_more(costs):
    assert costs["naive"].flops > 1.05 * costs["loop"].flops
