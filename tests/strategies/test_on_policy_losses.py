"""Losses of on-policy methods: limits, gradients, invariances."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import grad, gradcheck

from diffalign.diffusion.guidance import centred_guidance
from diffalign.diffusion.sde import normalised_log_ratio
from diffalign.errors import UserError
from diffalign.strategies.d3po import clipped_log_ratio, d3po_loss, preference_signs
from diffalign.strategies.dro import ranking_hinge
from diffalign.strategies.pair_loss import PairErrors
from diffalign.strategies.parrot import pareto_mask
from diffalign.strategies.policy_gradient import ClippedObjective, mean_of_counted
from diffalign.strategies.prdp import reward_difference_losses
from diffalign.strategies.seppo import anchor_sign, anchored_margin

ADVANTAGES = torch.tensor([1.0, -0.5, 0.0, 2.0], dtype=torch.float64)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_unchanged_policy_gives_minus_the_advantage() -> None:
    log_ratio = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    output = ClippedObjective()(log_ratio, ADVANTAGES)
    torch.testing.assert_close(output.loss, -ADVANTAGES.mean())
    assert output.metrics["ratio"].tolist() == [1.0] * 4
    torch.testing.assert_close(grad(output.loss, log_ratio)[0], -ADVANTAGES[:, None].expand(4, 3) / 12)


def test_steps_beyond_the_trust_region_have_no_gradient() -> None:
    log_ratio = torch.tensor([[0.2], [-0.2], [0.2], [-0.2]], dtype=torch.float64, requires_grad=True)
    (slope,) = grad(ClippedObjective(0.1)(log_ratio, torch.tensor([1.0, -1.0, -1.0, 1.0])).loss, log_ratio)
    assert (slope != 0).flatten().tolist() == [False, False, True, True]


def test_clipped_loss_has_the_gradient_of_its_differences() -> None:
    objective, log_ratio = ClippedObjective(0.1), (0.3 * randn(4, 3)).requires_grad_()
    assert gradcheck(lambda value: objective(value, ADVANTAGES).loss, log_ratio)


def test_masked_steps_count_for_nothing() -> None:
    log_ratio = torch.tensor([[0.01, math.nan], [0.02, 0.03]], dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    output = ClippedObjective(0.5)(log_ratio, ADVANTAGES[:2], mask=mask)
    alone = ClippedObjective(0.5)(log_ratio.detach()[:1, :1], ADVANTAGES[:1])
    torch.testing.assert_close(output.metrics["loss"][0], alone.loss)
    assert mean_of_counted(log_ratio.detach(), torch.zeros(2, 2)).tolist() == [0.0, 0.0]


def test_impossible_ranges_are_refused() -> None:
    with pytest.raises(UserError, match="clip_range"):
        ClippedObjective(clip_range=0.0)


def test_normalised_ratio_of_an_unchanged_policy_is_one() -> None:
    mean = randn(2, 3, 4)
    assert normalised_log_ratio(torch.zeros(2), mean, mean, torch.ones(2)).tolist() == [0.0, 0.0]


def test_d3po_starts_at_log_two_with_half_beta() -> None:
    log_probs = [randn(3, seed=seed).requires_grad_() for seed in (1, 2)]
    ratios = [clipped_log_ratio(value, value.detach()) for value in log_probs]
    signs = preference_signs(torch.tensor([1.0, 0.0, 2.0]), torch.tensor([0.0, 1.0, 2.0]))
    loss = d3po_loss(ratios[0], ratios[1], signs.double(), beta=0.4).loss
    assert loss.item() == pytest.approx(math.log(2))
    slopes = grad(loss, log_probs)
    expected = torch.tensor([-0.2, 0.2, 0.0], dtype=torch.float64) / 3
    torch.testing.assert_close(slopes[0], expected)
    torch.testing.assert_close(slopes[1], -expected)


def test_d3po_ignores_members_beyond_the_range() -> None:
    log_prob = torch.tensor([0.5, -0.5, 0.05], dtype=torch.float64, requires_grad=True)
    (slope,) = grad(clipped_log_ratio(log_prob, torch.zeros(3)).sum(), log_prob)
    assert slope.tolist() == [0.0, 0.0, 1.0]


def test_a_wide_range_leaves_d3po_unclipped() -> None:
    log_prob, reference = randn(8, seed=2), randn(8, seed=3)
    for eps in (1.0, 10.0, 1e6):
        clipped = clipped_log_ratio(log_prob, reference, eps)
        expected = (log_prob - reference).clamp(max=math.log1p(eps))
        torch.testing.assert_close(clipped, expected)


def test_preference_by_several_rewards_needs_dominance() -> None:
    signs = preference_signs(torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    assert signs.tolist() == [[1.0, -1.0], [0.0, 0.0]]


def prdp(log_prob: Tensor, rewards: Tensor, eps: float = 1e-4, beta: float = 0.5) -> Tensor:
    return reward_difference_losses(log_prob, randn(4, 3, seed=5), randn(4, 3, seed=6), rewards, beta, eps).loss


def test_prdp_ignores_what_a_group_shares_and_its_order() -> None:
    log_prob, rewards, order = randn(4, 3), randn(4, seed=1), torch.tensor([2, 0, 3, 1])
    base = prdp(log_prob, rewards)
    torch.testing.assert_close(prdp(log_prob, rewards + 7), base)
    parts = (log_prob, randn(4, 3, seed=5), randn(4, 3, seed=6), rewards)
    shuffled = reward_difference_losses(*(part[order] for part in parts), beta=0.5, eps=1e-4)
    torch.testing.assert_close(shuffled.loss, base)
    torch.testing.assert_close(prdp(log_prob, 3 * rewards, beta=1.5), base)


def test_prdp_is_never_below_its_unclipped_form() -> None:
    log_prob, rewards = randn(4, 3), randn(4, seed=1)
    plain = prdp(log_prob, rewards, eps=1e9)
    for eps in (1e-6, 1e-2, 1.0):
        assert prdp(log_prob, rewards, eps) >= plain - 1e-12


def test_prdp_vanishes_at_the_optimum_and_for_equal_rewards() -> None:
    rewards = randn(4, seed=1)
    optimal = randn(4, 3, seed=6) + rewards[:, None] / 0.5
    assert prdp(optimal, rewards, eps=1e9).item() == pytest.approx(0.0, abs=1e-20)
    log_prob = randn(4, 3).requires_grad_()
    loss = prdp(log_prob, torch.ones(4))
    assert loss.item() == 0.0
    assert not grad(loss, log_prob)[0].any()


@pytest.mark.parametrize(("beta", "eps", "gap"), [(3e-5, 1e-6, 0.01), (3e-5, 1e-4, 1.5), (3e-6, 1e-6, 2.0)])
@pytest.mark.parametrize("moved", [-3.0, 0.5, 3.0])
def test_prdp_clips_in_single_precision(beta: float, eps: float, gap: float, moved: float) -> None:
    """Two images of one step, the better one moved by so many eps: beyond the region only a wrong move has a gradient.

    The wanted difference is millions of times the trust region, with the paper's constants.
    """
    log_prob = torch.tensor([[moved * eps], [0.0]]).requires_grad_()
    old, rewards = torch.zeros(2, 1), torch.tensor([gap, 0.0])
    loss = reward_difference_losses(log_prob, old, old.clone(), rewards, beta, eps).loss
    slope = grad(loss, log_prob)[0][:, 0]
    whole = 2 * gap / beta
    torch.testing.assert_close(slope, torch.tensor([0.0 if moved > 1 else -whole, whole]), rtol=1e-4, atol=0)


def test_prdp_has_the_gradient_of_its_differences() -> None:
    assert gradcheck(lambda value: prdp(value, randn(4, seed=1), eps=0.3), randn(4, 3).requires_grad_())


def errors_of(policy: Tensor, reference: Tensor) -> PairErrors:
    return PairErrors(*policy.chunk(2), *reference.chunk(2))


def test_seppo_without_flip_is_the_margin_of_dpo() -> None:
    errors = errors_of(randn(6).abs(), randn(6, seed=1).abs())
    torch.testing.assert_close(anchored_margin(errors, anchor_sign(errors.d_w, "none")), errors.d_w - errors.d_l)


def test_seppo_counts_rounding_as_a_tie() -> None:
    d_w = torch.tensor([1e-9, -1e-9, 0.5, -0.5])
    assert anchor_sign(d_w, "sign", 1e-6).tolist() == [0.0, 0.0, 1.0, -1.0]
    assert anchor_sign(d_w, "indicator", 1e-6).tolist() == [0.0, 0.0, 1.0, 0.0]
    with pytest.raises(UserError, match="indicator"):
        anchor_sign(d_w, "indicatr")  # type: ignore[arg-type]


def test_seppo_sign_carries_no_gradient() -> None:
    policy = randn(4).abs().requires_grad_()
    assert not anchor_sign(errors_of(policy, randn(4, seed=1).abs()).d_w).requires_grad


def test_dro_starts_at_the_margin_with_everything_active() -> None:
    errors = randn(6).abs()
    output = ranking_hinge(errors_of(errors, errors.clone()), margin=0.001)
    assert output.loss.item() == pytest.approx(0.001)
    assert output.metrics["active_share"].tolist() == [1.0] * 3


def test_dro_rests_where_experts_lead() -> None:
    policy = torch.tensor([0.1, 0.5], dtype=torch.float64, requires_grad=True)
    output = ranking_hinge(errors_of(policy, torch.tensor([0.5, 0.5], dtype=torch.float64)))
    assert output.loss.item() == 0.0
    assert not grad(output.loss, policy)[0].any()


SCORES = st.lists(st.lists(st.integers(0, 4), min_size=2, max_size=2), min_size=1, max_size=12)


@settings(deadline=None)
@given(SCORES)
def test_front_is_what_nobody_dominates(scores: list[list[int]]) -> None:
    front = pareto_mask(torch.tensor(scores, dtype=torch.float64)).tolist()
    assert any(front)

    def beats(a: list[int], b: list[int]) -> bool:
        return a != b and all(x >= y for x, y in zip(a, b, strict=True))

    members = [score for score, inside in zip(scores, front, strict=True) if inside]
    for score, inside in zip(scores, front, strict=True):
        assert inside is not any(beats(other, score) for other in members)


def test_front_does_not_depend_on_scales() -> None:
    rewards = randn(8, 3)
    assert pareto_mask(rewards).equal(pareto_mask(rewards.exp() * 5 - 2))


def test_centred_guidance_has_ordinary_guidance_as_its_limits() -> None:
    original, expanded, null = (randn(2, 3, seed=seed) for seed in range(3))
    ordinary = null + 5 * (original - null)
    torch.testing.assert_close(centred_guidance(original, expanded, null, 5.0, 0.0), ordinary)
    doubled = null + 10 * (original - null)
    torch.testing.assert_close(centred_guidance(original, original, null, 5.0, 5.0), doubled)
