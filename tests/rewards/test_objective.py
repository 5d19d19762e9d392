"""Training objectives of scorers: optima, ties, weights, doubt."""

from __future__ import annotations

import math

import pytest
import torch

from diffalign.rewards.objective import caption_weights, heteroscedastic_cross_entropy, preference_cross_entropy

TIED, FIRST = torch.tensor([0.5]), torch.tensor([1.0])


def test_equal_logits_cost_log_two_and_nothing_for_a_tie() -> None:
    equal = torch.tensor([[3.0, 3.0]])
    assert preference_cross_entropy(equal, FIRST).item() == pytest.approx(math.log(2))
    assert preference_cross_entropy(equal, TIED).item() == pytest.approx(0.0, abs=1e-7)
    assert preference_cross_entropy(torch.tensor([[4.0, 3.0]]), TIED) > 0


def test_captions_count_alike_however_many_examples_they_have() -> None:
    weights = caption_weights(torch.tensor([1.0, 2.0, 2.0]))
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.25, 0.25]))


def test_doubtful_images_pull_less() -> None:
    means = torch.tensor([[0.0, 1.0]], dtype=torch.float64, requires_grad=True)
    sure, doubtful = torch.full((1, 2), -50.0).double(), torch.full((1, 2), 3.0).double()
    labels = FIRST.double()
    loss = heteroscedastic_cross_entropy(means, sure, labels)
    normal = torch.distributions.Normal(torch.tensor(0.0).double(), torch.tensor(1.0).double())
    torch.testing.assert_close(loss, -normal.cdf(torch.tensor(-1.0).double()).log())
    pulls = [
        torch.autograd.grad(heteroscedastic_cross_entropy(means, v, labels), means)[0].abs().sum()
        for v in (sure, doubtful)
    ]
    assert pulls[1] < 0.5 * pulls[0]
    assert torch.autograd.gradcheck(lambda m: heteroscedastic_cross_entropy(m, doubtful, labels), means)


def test_extreme_logits_stay_finite() -> None:
    means = torch.tensor([[-1e3, 1e3]], requires_grad=True)
    loss = heteroscedastic_cross_entropy(means, torch.zeros(1, 2), FIRST) + preference_cross_entropy(means, FIRST)
    assert loss.isfinite()
    assert torch.autograd.grad(loss, means)[0].isfinite().all()
