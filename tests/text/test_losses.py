"""Losses on sequence log-probabilities: published facts, limits, gradients by finite differences, invariants."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffalign.errors import UserError
from diffalign.strategies.base import LossOutput, Terms
from diffalign.text.losses import TextHead
from diffalign.text.strategies.dpo import DPO, DPOConfig
from diffalign.text.strategies.ipo import IPO, IPOConfig
from diffalign.text.strategies.simpo import SimPO, SimPOConfig
from diffalign.training.update import join_micro_batches
from tests.golden_cases.llm.tokens import on_tokens, pair_batch

HEADS = get_args(TextHead)
AT_START = {
    "sigmoid": math.log(2),
    "robust": math.log(2),
    "sigmoid_norm": math.log(2),
    "hinge": 1.0,
    "ipo": 1 / (4 * 0.2**2),
    "sppo_hard": 1 / (2 * 0.2**2),
    "apo_zero": 1.0,
    "apo_down": 1.0,
    "nca_pair": 2 * math.log(2),
    "bco_pair": 2 * math.log(2),
    "aot": math.log(2),
    "aot_unpaired": math.log(2),
}


def values(seed: int = 0, pairs: int = 4, length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Policy and reference values and a ragged mask, (2 B, length) float64."""
    generator = torch.Generator().manual_seed(seed)
    policy = -torch.rand(2 * pairs, length, generator=generator, dtype=torch.float64) - 0.1
    reference = -torch.rand(2 * pairs, length, generator=generator, dtype=torch.float64) - 0.1
    lengths = torch.randint(1, length + 1, (2 * pairs, 1), generator=generator)
    mask = (torch.arange(length) < lengths).double()
    return policy * mask, reference * mask, mask


def dpo(head: str, policy: Tensor, reference: Tensor, mask: Tensor, **options: Any) -> LossOutput:
    return on_tokens(DPO(DPOConfig(loss_type=[head], **options)), policy, mask, reference)  # type: ignore[list-item]


@pytest.mark.parametrize("head", AT_START)
def test_at_the_start_the_loss_is_known(head: str) -> None:
    policy, _, mask = values()
    output = dpo(head, policy, policy, mask, beta=0.2)
    assert output.loss.item() == pytest.approx(AT_START[head])
    assert output.metrics["rewards/accuracies"].sum() == 0  # a tie is no success


@pytest.mark.parametrize("head", HEADS)
def test_gradient_agrees_with_finite_differences(head: str) -> None:
    policy, reference, mask = values(1)

    def loss(x: Tensor) -> Tensor:
        return dpo(head, x, reference, mask, beta=0.7).loss

    assert torch.autograd.gradcheck(loss, policy.clone().requires_grad_())


def test_sigmoid_gradient_is_equal_over_tokens_and_opposite_over_the_pair() -> None:
    policy, reference, mask = values(2)
    policy.requires_grad_()
    (gradient,) = torch.autograd.grad(dpo("sigmoid", policy, reference, mask).loss, policy)
    chosen, rejected = gradient.chunk(2)
    assert (chosen[:, 0] < 0).all()
    assert torch.equal(rejected[:, 0], -chosen[:, 0])
    assert torch.equal(gradient, gradient[:, :1] * mask)


def test_no_smoothing_makes_robust_and_conservative_plain() -> None:
    policy, reference, mask = values(3)
    plain = dpo("sigmoid", policy, reference, mask).loss
    assert torch.allclose(dpo("robust", policy, reference, mask).loss, plain)
    one = slice(None, None, 4)  # rows 0 and 4: one pair
    alone = dpo("sigmoid", policy[one], reference[one], mask[one]).loss
    assert torch.allclose(dpo("aot", policy[one], reference[one], mask[one]).loss, alone)


@pytest.mark.parametrize("smoothing", [0.2, 0.5])
def test_conservative_loss_is_least_at_the_logit_of_the_smoothing(smoothing: float) -> None:
    beta = 0.5
    best = math.log((1 - smoothing) / smoothing) / beta
    margin = torch.tensor([[best], [0.0]], dtype=torch.float64, requires_grad=True)
    output = dpo("sigmoid", margin, torch.zeros(2, 1).double(), torch.ones(2, 1), beta=beta, label_smoothing=smoothing)
    (gradient,) = torch.autograd.grad(output.loss, margin)
    assert gradient.abs().max() < 1e-12


@settings(max_examples=25, deadline=None)
@given(shift=st.floats(-50, 50), seed=st.integers(0, 1000), head=st.sampled_from([h for h in HEADS if h != "sft"]))
def test_a_constant_on_policy_and_reference_changes_nothing(shift: float, seed: int, head: str) -> None:
    policy, reference, mask = values(seed)
    first = torch.zeros_like(mask)
    first[:, 0] = shift
    before, after = (dpo(head, policy + s, reference + s, mask).loss for s in (0, first))
    assert torch.allclose(before, after, atol=1e-8)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000))
def test_swapping_the_pair_negates_the_margin(seed: int) -> None:
    policy, reference, mask = values(seed)
    output = dpo("sigmoid", policy, reference, mask)
    swapped = dpo("sigmoid", *(torch.cat(x.chunk(2)[::-1]) for x in (policy, reference, mask)))
    assert torch.allclose(output.metrics["rewards/margins"], -swapped.metrics["rewards/margins"])
    difference = swapped.metrics["loss"] - output.metrics["loss"]
    assert torch.allclose(difference, output.metrics["rewards/margins"])


def test_a_mixture_is_the_weighted_sum() -> None:
    policy, reference, mask = values(4)
    weights = [0.8, 0.2, 1.0]
    parts = [dpo(head, policy, reference, mask).loss for head in ("sigmoid", "bco_pair", "sft")]
    config = DPOConfig(loss_type=["sigmoid", "bco_pair", "sft"], loss_weights=weights)
    mixed = on_tokens(DPO(config), policy, mask, reference).loss
    assert torch.allclose(mixed, sum(w * p for w, p in zip(weights, parts, strict=True)))


def test_sft_counts_tokens_over_the_whole_update_however_it_is_split() -> None:
    policy, reference, mask = values(5)
    strategy = DPO(DPOConfig(loss_type=["sft"]))
    assert strategy.spec.statistics == "update"
    whole = on_tokens(strategy, policy, mask, reference).loss
    parts = []
    for rows in ([0, 4], [1, 2, 3, 5, 6, 7]):
        frozen = {"mask": mask[rows], "reference": reference[rows]}
        parts.append((Terms(policy[rows], frozen), len(rows) // 2))
    statistics = strategy.statistics(join_micro_batches(parts), lambda value: value)
    losses = [strategy.loss(terms, statistics, pair_batch(terms.frozen["mask"])).loss * n for terms, n in parts]
    assert torch.allclose(sum(losses) / 4, whole)  # type: ignore[arg-type]


def test_ipo_with_and_without_lengths_is_the_head_of_dpo() -> None:
    policy, reference, mask = values(6)
    for norm in (True, False):
        own = on_tokens(IPO(IPOConfig(beta=0.3, length_norm=norm)), policy, mask, reference).loss
        assert torch.equal(own, dpo("ipo", policy, reference, mask, beta=0.3, ipo_length_norm=norm).loss)
    same = torch.ones_like(mask)
    pairs = dpo("ipo", policy, reference, same, beta=0.3).metrics["rewards/margins"] / 0.3 / mask.shape[1]
    assert torch.allclose(((pairs - 1 / 0.6) ** 2).mean(), dpo("ipo", policy, reference, same, beta=0.3).loss)


def test_equal_lengths_make_sigmoid_norm_dpo_with_a_smaller_beta() -> None:
    policy, reference, _ = values(7)
    mask = torch.ones_like(policy)
    norm = dpo("sigmoid_norm", policy, reference, mask, beta=2.0).loss
    assert torch.allclose(norm, dpo("sigmoid", policy, reference, mask, beta=2.0 / 5).loss)


def test_simpo_starts_at_softplus_of_gamma_and_is_log_two_at_the_margin() -> None:
    same = torch.full((2, 3), -0.4, dtype=torch.float64)
    config = SimPOConfig(beta=2.5, gamma_beta_ratio=0.55)
    mask = torch.ones(2, 3)
    assert on_tokens(SimPO(config), same, mask).loss.item() == pytest.approx(math.log1p(math.exp(2.5 * 0.55)))
    apart = same + torch.tensor([[0.55], [0.0]])
    assert on_tokens(SimPO(config), apart, mask).loss.item() == pytest.approx(math.log(2))


def test_simpo_per_token_gradient_is_closed_form_and_supervision_adds_up() -> None:
    policy, _, mask = values(8)
    policy.requires_grad_()
    config = SimPOConfig(beta=2.0, gamma_beta_ratio=0.5)
    output = on_tokens(SimPO(config), policy, mask)
    (gradient,) = torch.autograd.grad(output.loss, policy)
    means = (policy.detach() * mask).sum(1) / mask.sum(1)
    slope = 2.0 * torch.sigmoid(1.0 - 2.0 * (means[:4] - means[4:])) / 4
    assert torch.allclose(gradient[:4], -(slope / mask[:4].sum(1))[:, None] * mask[:4])
    supervised = on_tokens(SimPO(SimPOConfig(beta=2.0, gamma_beta_ratio=0.5, sft_weight=0.3)), policy, mask).loss
    nll = -(policy * mask)[:4].sum() / mask[:4].sum()
    assert torch.allclose(supervised, output.loss + 0.3 * nll)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"loss_type": ["sigmod"]}, "did you mean 'sigmoid'"),
        ({"loss_type": []}, "one loss or more"),
        ({"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0]}, "one weight each"),
        ({"loss_type": ["hinge"], "label_smoothing": 0.1}, "does nothing"),
        ({"label_smoothing": 0.6}, "probability"),
        ({"loss_type": ["robust"], "label_smoothing": 0.5}, "robust divides"),
        ({"beta": 0.0}, "above 0"),
    ],
)
def test_contradictory_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DPOConfig(**options)
    with pytest.raises(UserError, match="sigmoid head"):
        SimPOConfig(head="hinge", label_smoothing=0.1)
    with pytest.raises(UserError, match="probability"):
        SimPOConfig(label_smoothing=0.6)


@pytest.mark.parametrize(
    ("method", "config"), [(DPO, DPOConfig(beta=0.3)), (IPO, IPOConfig(beta=0.3)), (SimPO, SimPOConfig(beta=0.3))]
)
def test_every_text_method_offers_supervision_and_holds_rejected_gradients_back(method: Any, config: Any) -> None:
    policy, reference, mask = values()

    def slopes(**options: float) -> tuple[Tensor, Tensor, Tensor]:
        leaf = policy.clone().requires_grad_()
        loss = on_tokens(method(replace(config, **options)), leaf, mask, reference).loss
        chosen, rejected = torch.autograd.grad(loss, leaf)[0].chunk(2)
        return loss.detach(), chosen, rejected

    (loss, chosen, rejected), held = slopes(), slopes(rejected_gradient_scale=0.25)
    assert loss == held[0]
    torch.testing.assert_close(held[1], chosen)
    torch.testing.assert_close(held[2], 0.25 * rejected)
    tokens = mask.chunk(2)[0]
    supervised, expected = slopes(sft_weight=0.3), loss - 0.3 * policy.chunk(2)[0].sum() / tokens.sum()
    torch.testing.assert_close(supervised[0], expected)
    torch.testing.assert_close(supervised[1], chosen - 0.3 * tokens / tokens.sum())
    torch.testing.assert_close(supervised[2], rejected)
