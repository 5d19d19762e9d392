"""RankDPO: weights from rankings, limits, gradients, and one evaluation for each image."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.strategies.pair_loss import PairConfig, PairErrors, PairObjective
from diffalign.strategies.rankdpo import RankDPO, RankDPOConfig, pair_weights, preference_probabilities, ranks
from tests.strategies.support import context, examples, image_batch, moved_policy, numbers, objective, step, terms


def rows(values):
    """(B, N) to (N * B,) in block order."""
    return values.T.flatten()


def scores_without_ties(batch: int, images: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.stack([torch.randperm(images, generator=generator) for _ in range(batch)]).double()


def value(err, ref_err, scores, **config):
    strategy = RankDPO(RankDPOConfig(**config))
    return objective(strategy, terms(rows(err), rows(ref_err)), examples(len(err), scores=scores))


def test_at_the_reference_the_loss_is_log_two_times_the_mean_weight():
    err, scores = numbers(3, 4), scores_without_ties(3, 4)
    expected = math.log(2) * pair_weights(preference_probabilities(scores[..., None])).sum((1, 2)).mean()
    torch.testing.assert_close(value(err, err, scores).loss, expected)
    torch.testing.assert_close(value(err, err, scores, normalise_weights=True).loss.item(), math.log(2))


def test_two_images_are_a_weighted_diffusion_dpo():
    err, ref_err = numbers(3, 2), numbers(3, 2, seed=1)
    output = value(err, ref_err, torch.tensor([[2.0, 1.0]] * 3), beta=30.0)
    pairs = PairObjective(PairConfig(beta=60.0))(PairErrors(err[:, 0], err[:, 1], ref_err[:, 0], ref_err[:, 1]))
    delta = (2**1 - 2**0) * (1 / math.log(2) - 1 / math.log(3))
    torch.testing.assert_close(output.loss, delta * pairs.loss)
    torch.testing.assert_close(output.metrics["logit"], pairs.metrics["logit"])
    torch.testing.assert_close(output.metrics["winner_margin"], pairs.metrics["winner_margin"])


def test_the_loss_is_the_sum_of_weighted_pair_losses_and_the_mean_over_lists():
    err, ref_err, scores = numbers(2, 4), numbers(2, 4, seed=1), numbers(2, 4, 3, seed=2)
    weights = pair_weights(preference_probabilities(scores))
    total = torch.zeros((), dtype=torch.float64)
    for b, i, j in weights.nonzero().tolist():
        pair = PairErrors(err[b, i, None], err[b, j, None], ref_err[b, i, None], ref_err[b, j, None])
        total = total + weights[b, i, j] * PairObjective(PairConfig(beta=2 * 40.0))(pair).loss
    torch.testing.assert_close(value(err, ref_err, scores, beta=40.0).loss, total / 2)


@settings(max_examples=20, deadline=None)
@given(st.permutations(range(4)), st.integers(0, 1000))
def test_the_order_of_images_does_not_matter(order, seed):
    err, ref_err, scores = numbers(2, 4, seed=seed), numbers(2, 4, seed=seed + 1), scores_without_ties(2, 4, seed)
    order = list(order)
    first = value(err, ref_err, scores, beta=40.0).loss
    torch.testing.assert_close(value(err[:, order], ref_err[:, order], scores[:, order], beta=40.0).loss, first)


def test_only_orderings_of_rewards_matter():
    scores = numbers(2, 4, 3)
    bent = torch.stack([scores[..., 0].exp(), 100 * scores[..., 1] - 7, scores[..., 2] ** 3], dim=-1)
    torch.testing.assert_close(preference_probabilities(bent), preference_probabilities(scores))
    torch.testing.assert_close(preference_probabilities(scores).sum(1), torch.full((2,), 2.0, dtype=torch.float64))


def test_ties_win_nothing_and_keep_their_order():
    phi = preference_probabilities(torch.tensor([[[1.0], [2.0], [1.0]]]))
    torch.testing.assert_close(phi, torch.tensor([[0.0, 1.0, 0.0]]))
    assert ranks(phi).tolist() == [[2, 1, 3]]
    weights = pair_weights(phi)
    assert weights[0, 0, 2] == 0
    assert (weights > 0).sum() == 2


def test_best_against_worst_weighs_most():
    scores = scores_without_ties(5, 4)
    weights, rank = pair_weights(preference_probabilities(scores[..., None])), ranks(scores)
    for b in range(5):
        best, worst = int(rank[b].argmin()), int(rank[b].argmax())
        assert weights[b].max() == weights[b, best, worst]


def test_a_list_of_ties_teaches_nothing():
    err = numbers(2, 3).requires_grad_()
    output = value(err, numbers(2, 3, seed=1), torch.ones(2, 3), normalise_weights=True)
    output.loss.backward()
    assert output.loss == 0
    assert not err.grad.any()
    assert all(v.isfinite().all() for v in output.metrics.values())


def test_without_scores_the_order_is_the_ranking():
    err, ref_err = numbers(2, 4), numbers(2, 4, seed=1)
    strategy = RankDPO(RankDPOConfig(beta=40.0))
    by_order = objective(strategy, terms(rows(err), rows(ref_err)), examples(2)).loss
    torch.testing.assert_close(by_order, value(err, ref_err, torch.tensor([[4.0, 3, 2, 1]] * 2), beta=40.0).loss)


def test_a_list_without_scores_in_a_batch_with_scores_keeps_its_order():
    err, ref_err = numbers(2, 4), numbers(2, 4, seed=1)
    strategy = RankDPO(RankDPOConfig(beta=40.0))
    scores = torch.tensor([[0.1, 0.7, 0.2, 0.9], [torch.nan] * 4])
    mixed = objective(strategy, terms(rows(err), rows(ref_err)), examples(2, scores=scores)).loss
    known = torch.tensor([[0.1, 0.7, 0.2, 0.9], [4.0, 3, 2, 1]])
    torch.testing.assert_close(mixed, value(err, ref_err, known, beta=40.0).loss)


def test_gradients_by_finite_differences():
    ref_err, scores = numbers(2, 3, seed=1), scores_without_ties(2, 3)
    err = numbers(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda e: value(e, ref_err, scores, beta=20.0, sft_weight=0.3).loss, err)


def test_descent_lowers_the_best_error_and_raises_the_worst():
    err, scores = numbers(3, 4).requires_grad_(), scores_without_ties(3, 4)
    value(err, numbers(3, 4, seed=1), scores).loss.backward()
    best, worst = scores.argmax(1, keepdim=True), scores.argmin(1, keepdim=True)
    assert (err.grad.gather(1, best) >= 0).all()
    assert (err.grad.gather(1, worst) <= 0).all()
    torch.testing.assert_close(err.grad.sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-9, rtol=0)


def test_scaled_rejected_gradient_and_supervision():
    scores = torch.tensor([[3.0, 2.0, 1.0]])
    grads = {}
    for scale in (0.0, 1.0):
        err = numbers(1, 3).requires_grad_()
        value(err, numbers(1, 3, seed=1), scores, rejected_gradient_scale=scale).loss.backward()
        grads[scale] = err.grad
    assert grads[1.0][0, 2] < 0
    assert grads[0.0][0, 2] == 0
    torch.testing.assert_close(grads[0.0][0, 0], grads[1.0][0, 0])
    err = torch.tensor([[1.0, 1.0, 4.0]], dtype=torch.float64).requires_grad_()
    value(err, numbers(1, 3, seed=1), scores, rejected_gradient_ratio=1.0).loss.backward()
    bounded, err.grad = err.grad, None
    value(err, numbers(1, 3, seed=1), scores).loss.backward()
    torch.testing.assert_close(bounded[0, 2], 0.5 * err.grad[0, 2])  # of the root of a fourfold error, a half
    err = numbers(2, 3)
    plain, anchored = (value(err, err, scores.expand(2, 3), sft_weight=w).loss for w in (0.0, 2.0))
    torch.testing.assert_close(anchored - plain, 2 * err[:, 0].mean())


def test_a_list_of_one_image_is_refused():
    with pytest.raises(UserError, match="two images at least, got 1"):
        preference_probabilities(torch.ones(2, 1, 1))


@pytest.mark.parametrize("process", ["epsilon", "v_prediction", "flow"])
def test_each_image_is_evaluated_once_with_its_own_noise(process, monkeypatch):
    policy = moved_policy(process)
    batch = image_batch(policy, examples=2, images=4, scores=scores_without_ties(2, 4))
    seen, predict = [], policy.predict
    monkeypatch.setattr(policy, "predict", lambda x, t, c: seen.append(len(x)) or predict(x, t, c))
    strategy = RankDPO(RankDPOConfig())
    _, output = step(strategy, context(policy), batch)
    assert seen == [8, 8]
    assert output.loss.isfinite()

    draws = strategy.draw(context(policy), batch)
    blocks = draws.timesteps.chunk(4)
    assert all(torch.equal(block, blocks[0]) for block in blocks)
    level = policy.process.level(draws.timesteps)
    noise = policy.process.noise_from(draws.latents, batch.latents, level).chunk(4)
    assert not torch.allclose(noise[0], noise[1], atol=1e-3)
    together = RankDPO(RankDPOConfig(shared_noise=True)).draw(context(policy), batch)
    noise = policy.process.noise_from(together.latents, batch.latents, policy.process.level(together.timesteps)).chunk(
        4
    )
    torch.testing.assert_close(noise[0], noise[1], atol=1e-3, rtol=1e-3)
