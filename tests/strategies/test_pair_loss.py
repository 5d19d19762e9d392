"""Margins, logit and loss that all pairwise methods share, and the heads."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from diffalign.errors import UserError
from diffalign.strategies.beta import beta_for_sums
from diffalign.strategies.heads import accuracy, differences, preference_loss, scale_gradient
from diffalign.strategies.pair_loss import PairConfig, PairErrors, PairObjective
from tests.strategies.support import numbers, terms

ERRORS = PairErrors.of(terms(numbers(6), numbers(6, seed=1)))
some_numbers = st.floats(-1, 1, allow_subnormal=False)


def shifted(errors, policy=0.0, reference=0.0):
    return PairErrors(
        errors.err_w + policy, errors.err_l + policy, errors.ref_err_w + reference, errors.ref_err_l + reference
    )


def test_the_formula_by_hand():
    pair = PairErrors(*(torch.tensor([value], dtype=torch.float64) for value in (0.10, 0.20, 0.12, 0.19)))
    output = PairObjective(PairConfig(beta=100.0))(pair)
    assert output.metrics["logit"].item() == pytest.approx(0.5 * 100 * (0.02 - -0.01))
    assert output.loss.item() == pytest.approx(math.log1p(math.exp(-1.5)))
    assert output.metrics["winner_margin"].item() == pytest.approx(0.02)
    assert output.metrics["loser_margin"].item() == pytest.approx(0.01)
    assert output.metrics["effective_weight"].item() == pytest.approx(1 / (1 + math.exp(1.5)))


def test_the_mean_is_taken_after_the_sigmoid():
    output = PairObjective(PairConfig(beta=200.0))(ERRORS)
    each = torch.nn.functional.softplus(-output.metrics["logit"])
    assert_close(output.loss, each.mean())
    assert not torch.allclose(output.loss, torch.nn.functional.softplus(-output.metrics["logit"].mean()))


@given(constant=some_numbers, other=some_numbers, factor=st.floats(0.1, 10))
@settings(max_examples=30, deadline=None)
def test_constants_cancel_and_beta_scales_the_logit(constant, other, factor):
    logit = PairObjective(PairConfig(beta=50.0))(ERRORS).metrics["logit"]
    same = PairObjective(PairConfig(beta=50.0))(shifted(ERRORS, constant, other)).metrics["logit"]
    assert_close(same, logit, rtol=1e-9, atol=1e-9)
    assert_close(PairObjective(PairConfig(beta=50.0 * factor))(ERRORS).metrics["logit"], factor * logit)


@given(st.floats(-600, 600))
@settings(max_examples=50, deadline=None)
def test_swapping_the_label_costs_the_logit(z):
    logit = torch.tensor(z, dtype=torch.float64, requires_grad=True)
    loss, back = preference_loss(logit, 1.0), preference_loss(-logit, 1.0)
    assert_close(loss - back, -logit)
    (slope,) = torch.autograd.grad(loss, logit)
    assert loss.isfinite()
    assert slope.isfinite()


def test_small_beta_descends_the_plain_difference_of_errors():
    err = numbers(6).requires_grad_()
    output = PairObjective(PairConfig(beta=1e-6))(PairErrors.of(terms(err, numbers(6, seed=1))))
    (slope,) = torch.autograd.grad(output.loss, err)
    assert_close(slope * 4 / 1e-6, torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64) / 3)


@pytest.mark.parametrize("head", ["sigmoid", "hinge", "ipo"])
def test_heads_have_the_gradients_of_finite_differences(head):
    margin = numbers(5, low=-0.03, high=0.03).requires_grad_()
    smoothing = 0.1 if head == "sigmoid" else 0.0
    assert torch.autograd.gradcheck(lambda m: preference_loss(m, 30.0, head, smoothing), margin)


def test_unknown_head_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'hinge'"):
        preference_loss(torch.zeros(1), 1.0, "hing")


def test_a_tie_is_half_a_success_or_none():
    margin = torch.tensor([-1.0, 0.0, 2.0])
    assert accuracy(margin).tolist() == [0.0, 0.5, 1.0]
    assert accuracy(margin, tie=0.0).tolist() == [0.0, 0.0, 1.0]


def test_scaled_gradients_leave_values_alone():
    value = numbers(3).requires_grad_()
    scaled = scale_gradient(value, 0.25)
    assert torch.equal(scaled, value)
    assert torch.autograd.grad(scaled.sum(), value)[0].tolist() == [0.25] * 3
    assert scale_gradient(value, 1.0) is value


def test_the_rejected_gradient_is_no_longer_than_a_multiple_of_the_chosen_one():
    """In the space of predictions: there the gradient of an error is what a step moves."""
    target, predictions = torch.zeros(4, 6, dtype=torch.float64), numbers(4, 6, low=0.5, high=1.0)
    predictions[2] *= 10.0  # a rejected image far off
    lengths = {}
    for ratio in (0.0, 0.5):
        leaf = predictions.clone().requires_grad_()
        errors = PairErrors.of(terms((leaf - target).square().mean(1), numbers(4, seed=1)))
        output = PairObjective(PairConfig(beta=2.0, rejected_gradient_ratio=ratio))(errors)
        (slope,) = torch.autograd.grad(output.loss, leaf)
        lengths[ratio] = slope.norm(dim=1)
    assert_close(lengths[0.5][:2], lengths[0.0][:2])  # chosen
    assert_close(lengths[0.5][2:], torch.minimum(lengths[0.0][2:], 0.5 * lengths[0.0][:2]))
    assert lengths[0.5][2] < 0.1 * lengths[0.0][2]


def test_differences_of_all_pairs():
    values = torch.tensor([[1.0, 4.0, 6.0], [0.0, 2.0, -1.0]])
    assert differences(values).tolist() == [[[a - b for b in row] for a in row] for row in values.tolist()]
    assert_close(differences(values[0]), differences(values)[0])


def test_swapping_pairs_exchanges_their_errors():
    back = ERRORS.swapped(torch.tensor([True, False, True]))
    assert_close(back.err_w, torch.stack([ERRORS.err_l[0], ERRORS.err_w[1], ERRORS.err_l[2]]))
    assert_close(back.ref_err_l, torch.stack([ERRORS.ref_err_w[0], ERRORS.ref_err_l[1], ERRORS.ref_err_w[2]]))


def test_columns_are_averaged():
    wide = PairErrors.of(terms(numbers(4), numbers(4)))
    assert wide.err_w.shape == (2,)


def test_the_papers_beta():
    assert beta_for_sums(2000, 16384) == pytest.approx(0.061, abs=1e-3)
    assert beta_for_sums(5000, 65536) == pytest.approx(0.038, abs=1e-3)


@pytest.mark.parametrize("name", ["sft_weight", "rejected_gradient_scale", "rejected_gradient_ratio"])
def test_negative_options_are_refused(name):
    with pytest.raises(UserError, match=name):
        PairConfig(**{name: -1.0})
