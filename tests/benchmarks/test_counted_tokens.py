"""Counting equal text tokens changes the cost, not the prediction: exact counts, no timings."""

from __future__ import annotations

import pytest

from benchmarks.counted_tokens import compare, conditions
from diffalign.errors import UserError
from diffalign.policies.sd3 import T5_LENGTH
from tests.factories import tiny_sd, tiny_sd3


def test_one_token_does_the_work_of_all() -> None:
    costs, difference = compare(tiny_sd3(lora=True), rows=2)
    assert difference < 1e-5
    assert costs["written out"].flops > 3 * costs["counted"].flops
    assert costs["written out"].saved_bytes > 3 * costs["counted"].saved_bytes


def test_every_zero_token_is_written_out() -> None:
    encoded = conditions(tiny_sd3(), ["a", "b"])
    counted, full = (condition.tensors["prompt_embeds"] for condition in encoded.values())
    assert full.shape[1] == counted.shape[1] - 1 + T5_LENGTH
    assert not full[:, -T5_LENGTH:].any()


def test_other_models_are_refused() -> None:
    with pytest.raises(UserError, match="T5"):
        conditions(tiny_sd(), ["a"])
