"""MaPO: the margin function, its limits, and no reference anywhere."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.strategies.mapo import MaPO, MaPOConfig, mapo_margin, phi
from tests.strategies.support import context, examples, image_batch, moved_policy, numbers, objective, step, terms


def value(err_w, err_l, **config):
    return objective(MaPO(MaPOConfig(**config)), terms(torch.cat([err_w, err_l])), examples(len(err_w)))


def test_equal_errors_give_the_error_and_beta_log_two():
    err = numbers(4)
    torch.testing.assert_close(value(err, err, beta=0.3).loss, err.mean() + 0.3 * math.log(2))


def test_beta_zero_is_supervision():
    err_w = numbers(4)
    torch.testing.assert_close(value(err_w, numbers(4, seed=1), beta=0.0).loss, err_w.mean())


def test_a_settled_pair_is_supervised_only():
    err_w, err_l = numbers(3).requires_grad_(), (numbers(3) + 3).requires_grad_()
    value(err_w, err_l).loss.backward()
    torch.testing.assert_close(err_w.grad, torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(err_l.grad, torch.zeros(3, dtype=torch.float64))


def test_swapping_the_pair_flips_the_logit():
    err_w, err_l = numbers(4), numbers(4, seed=1)
    first, second = value(err_w, err_l).metrics["logit"], value(err_l, err_w).metrics["logit"]
    torch.testing.assert_close(first, -second)


def test_label_noise_exchanges_a_share_of_the_pairs():
    err_w, err_l = numbers(200), numbers(200, seed=1)
    clean, all_wrong = value(err_w, err_l).metrics, value(err_l, err_w).metrics
    some = value(err_w, err_l, label_noise_prob=0.25).metrics["logit"]
    wrong = some != clean["logit"]
    torch.testing.assert_close(some[wrong], all_wrong["logit"][wrong])
    assert 30 < wrong.sum() < 70
    with pytest.raises(UserError, match="label_noise_prob"):
        MaPOConfig(label_noise_prob=1.5)


def test_gradients_by_finite_differences_and_their_signs():
    errors = numbers(6).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: value(*e.chunk(2), margin_scale=10.0).loss, errors)
    value(*errors.chunk(2)).loss.backward()
    grad_w, grad_l = errors.grad.chunk(2)
    assert (grad_w > 0).all()
    assert (grad_l < 0).all()


def test_the_mean_is_taken_after_the_log_sigmoid():
    err_w, err_l = numbers(3), numbers(3, seed=1)
    each = torch.stack([value(err_w[i, None], err_l[i, None]).loss for i in range(3)])
    torch.testing.assert_close(value(err_w, err_l).loss, each.mean())


def test_the_revised_papers_form_is_a_setting():
    err_w, err_l, b = numbers(4, high=2.0), numbers(4, seed=1, high=2.0), 8.0
    written = [(e / (e.exp() - 1)) ** b for e in (err_w, err_l)]
    expected = err_w.mean() - torch.nn.functional.logsigmoid(written[0] - written[1]).mean() / b
    torch.testing.assert_close(value(err_w, err_l, beta=1 / b, snr_value=1.0, margin_scale=1.0, power=b).loss, expected)


@settings(max_examples=50, deadline=None)
@given(st.floats(1e-9, 80))
def test_phi_is_exact(x):
    at = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    result = phi(at)
    result.backward()
    assert result.item() == pytest.approx(x / math.expm1(x), rel=1e-10)
    if x > 0.01:
        slope = (math.expm1(x) - x * math.exp(x)) / math.expm1(x) ** 2
        assert at.grad.item() == pytest.approx(slope, rel=1e-7)


def test_phi_in_float32_at_the_ends():
    x = torch.tensor([0.0, 1e-6, 0.0015, 0.0999, 0.1001, 50.0, 1000.0], requires_grad=True)
    result = phi(x)
    result.sum().backward()
    assert result[0] == 1
    assert result[-1] == 0
    torch.testing.assert_close(x.grad[:3], torch.tensor([-0.5, -0.5 + 1e-6 / 6, -0.5 + 0.0015 / 6]), rtol=1e-6, atol=0)
    assert (result.diff() < 0).all()
    assert x.grad.isfinite().all()


def test_the_margin_is_bounded():
    config = MaPOConfig()
    z = mapo_margin(torch.tensor([0.0, 1e4]), torch.tensor([1e4, 0.0]), config)
    torch.testing.assert_close(z, torch.tensor([config.margin_scale, -config.margin_scale]))


@pytest.mark.parametrize("process", ["epsilon", "v_prediction", "flow"])
def test_no_reference_is_ever_asked(process, monkeypatch):
    policy = moved_policy(process)
    calls, predict = [], policy.predict
    monkeypatch.setattr(policy, "predict", lambda x, t, c: calls.append(len(x)) or predict(x, t, c))
    values, output = step(MaPO(MaPOConfig()), context(policy, with_reference=False), image_batch(policy, examples=3))
    assert calls == [6]
    assert values.frozen == {}
    output.loss.backward()
    assert policy.module.delta["default"].grad.abs().sum() > 0
