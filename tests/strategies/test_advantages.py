"""Advantages: invariances, groups of equal rewards, running statistics that survive an interruption."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.strategies.advantages import (
    PromptStatistics,
    batch_advantages,
    combined_advantages,
    group_advantages,
)
from diffalign.strategies.standardised import StandardisedConfig

REWARDS = torch.tensor([0.3, 0.9, 0.1, 5.0, 7.0, 6.5], dtype=torch.float64)
GROUPS = torch.tensor([4, 4, 4, 1, 1, 1])


def test_group_advantages_have_no_mean_and_unit_variance() -> None:
    advantages = group_advantages(REWARDS, GROUPS, "group", eps=0.0).reshape(2, 3)
    torch.testing.assert_close(advantages.mean(1), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(advantages.std(1, correction=0), torch.ones(2, dtype=torch.float64))


@pytest.mark.parametrize("scope", ["group", "batch"])
@pytest.mark.parametrize("unbiased", [True, False])
def test_equal_rewards_have_no_advantage(scope: str, unbiased: bool) -> None:
    rewards = torch.full((6,), 0.1)
    advantages = group_advantages(rewards, GROUPS, scope, eps=1e-8, unbiased=unbiased)  # type: ignore[arg-type]
    assert advantages.tolist() == [0.0] * 6


def test_images_alone_in_their_group_have_no_advantage() -> None:
    assert group_advantages(REWARDS, torch.arange(6), "group", unbiased=True).tolist() == [0.0] * 6


@given(st.permutations(range(6)))
def test_order_of_images_does_not_matter(order: list[int]) -> None:
    """So the split over processes does not either, once rewards are gathered."""
    whole = group_advantages(REWARDS, GROUPS)
    torch.testing.assert_close(group_advantages(REWARDS[order], GROUPS[order]), whole[order])


def test_batch_advantages_are_those_of_one_group() -> None:
    expected = (REWARDS - REWARDS.mean()) / (REWARDS.std(correction=0) + 1e-8)
    torch.testing.assert_close(batch_advantages(REWARDS), expected)


def test_weight_zero_leaves_a_reward_out() -> None:
    rewards = {"a": REWARDS, "b": REWARDS.flip(0)}
    total, parts = combined_advantages(rewards, {"a": 1.0, "b": 0.0}, GROUPS)
    torch.testing.assert_close(total, parts["a"])


def test_weights_must_name_the_rewards() -> None:
    with pytest.raises(UserError, match="name the same"):
        combined_advantages({"a": REWARDS}, {"b": 1.0}, GROUPS)


def test_full_buffer_of_one_value_gives_zero() -> None:
    tracker = PromptStatistics(buffer_size=2, min_count=2)
    assert tracker.update(["a", "a", "b"], torch.tensor([0.5, 0.5, 9.0]))[:2].tolist() == [0.0, 0.0]


def test_rare_captions_are_standardised_by_the_rollout() -> None:
    tracker = PromptStatistics(buffer_size=4, min_count=4)
    torch.testing.assert_close(
        tracker.update(list("abcdef"), REWARDS), batch_advantages(REWARDS, eps=1e-6), rtol=1e-12, atol=1e-12
    )


def test_statistics_continue_after_an_interruption() -> None:
    one, other = PromptStatistics(3, 2), PromptStatistics(3, 2)
    one.update(["a", "b"] * 3, REWARDS)
    other.load_state_dict(one.state_dict())
    again = torch.tensor([1.0, 2.0, 4.0])
    assert one.update(["a", "b", "a"], again).equal(other.update(["a", "b", "a"], again))
    assert one.state_dict() == other.state_dict()


def test_captions_that_are_forgotten_too_soon_are_standardised_by_the_rollout() -> None:
    tracker = PromptStatistics(buffer_size=2, min_count=3)
    expected = batch_advantages(REWARDS, eps=1e-6)
    torch.testing.assert_close(tracker.update(["a"] * 6, REWARDS), expected, rtol=1e-12, atol=1e-12)


def test_statistics_that_never_start_are_refused() -> None:
    for least in (0, 9):
        with pytest.raises(UserError, match=f"statistics_min_count is {least}: expected 1 to 8"):
            StandardisedConfig(statistics_size=8, statistics_min_count=least)
