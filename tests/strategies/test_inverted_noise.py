"""InPO and SmPO: where the inversion ends, who makes it, and how scores weigh pairs."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from diffalign.data.fields import field_tensors
from diffalign.data.load import load_examples
from diffalign.diffusion.process import DiscreteProcess
from diffalign.errors import UserError
from diffalign.strategies.base import Piece
from diffalign.strategies.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from diffalign.strategies.inpo import InPO, InPOConfig
from diffalign.strategies.inverted_noise import InvertedNoise
from diffalign.strategies.pair_kernel import DenoisingKernel, fresh_noise
from diffalign.strategies.smpo import TWO_PREDICTIONS, SmPO, SmPOConfig, label_weight, winner_probability
from tests.battery.methods import select
from tests.data.support import encoded
from tests.factories import ToyPolicy
from tests.strategies.support import context, examples, image_batch, moved_policy, numbers, objective, step, terms

PROCESSES = ["epsilon", "v_prediction", "flow"]
SCORES = torch.tensor([[0.25, 0.17], [0.21, 0.20], [0.19, 0.24]])


@pytest.mark.parametrize("eta", [0.0, 0.1])
@pytest.mark.parametrize("process", PROCESSES)
def test_exact_matching_ends_at_the_level_of_the_label(process, eta):
    policy = moved_policy(process)
    batch = image_batch(policy, examples=3)
    draws = InvertedNoise(num_steps=4, eta=eta)(context(policy), batch)
    level = policy.process.level(draws.timesteps)
    x0 = policy.process.to_x0(draws.target, draws.latents, level)
    assert_close(x0, batch.latents, rtol=1e-3, atol=1e-3)
    noise = policy.process.to_epsilon(draws.target, draws.latents, level)
    assert_close(policy.process.add_noise(batch.latents, noise, draws.timesteps), draws.latents, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("process", ["epsilon", "flow"])
def test_a_constant_network_is_already_right(process):
    """Its own inversion gives back what it predicts, so that its error is zero: eps* = k, v* = k."""
    policy = ToyPolicy(process, weight=(0.0, 0.0))
    if process == "epsilon":
        policy.process = DiscreteProcess(policy.process.alphas_cumprod, clean_alpha_to_one=True)
    policy.predict = lambda latents, timesteps, condition: torch.full_like(latents, 0.3)
    batch = image_batch(policy, examples=3)
    draws = InvertedNoise(num_steps=5)(context(policy), replace(batch, latents=batch.latents.double()))
    assert_close(draws.target, torch.full_like(draws.target, 0.3), rtol=1e-6, atol=1e-6)


def test_randomness_follows_the_seeds():
    policy = moved_policy()
    batch = image_batch(policy, examples=3)
    other = replace(batch, seeds=batch.seeds + 1)
    pinned = {"timesteps": lambda ctx, batch: torch.tensor([300, 500, 900])}
    still, noisy = InvertedNoise(3, **pinned), InvertedNoise(3, eta=0.1, **pinned)
    ctx = context(policy)
    assert torch.equal(still(ctx, batch).latents, still(ctx, other).latents)
    assert torch.equal(noisy(ctx, batch).latents, noisy(ctx, batch).latents)
    assert not torch.allclose(noisy(ctx, batch).latents, noisy(ctx, other).latents)


@pytest.mark.parametrize(("matching", "evaluated"), [("exact", [6, 4, 2]), ("official", [6, 6, 4, 2])])
def test_images_that_have_arrived_are_not_evaluated_again(matching, evaluated):
    policy, rows = moved_policy(), []
    batch = image_batch(policy, examples=3)
    predict = policy.predict
    policy.predict = lambda *inputs: (rows.append(len(inputs[0])), predict(*inputs))[1]
    stops = torch.tensor([150, 550, 350])
    together = InvertedNoise(5, matching, timesteps=lambda ctx, batch: stops)(context(policy), batch)
    assert rows == evaluated
    alone = torch.cat([_alone(policy, batch, matching, row, stops) for row in (0, 1, 2)])
    assert_close(together.latents, alone.view(3, 2, *alone.shape[1:]).transpose(0, 1).flatten(0, 1))


def _alone(policy, batch, matching, row, stops):
    one = InvertedNoise(5, matching, timesteps=lambda ctx, batch: stops[[row]])
    return one(context(policy), select(batch, [row])).latents


def test_official_matching_ends_at_the_next_level_of_its_grid():
    policy = moved_policy()
    batch = image_batch(policy, examples=2)
    at = {"timesteps": lambda ctx, batch: torch.tensor([450, 501])}
    official, exact = (InvertedNoise(10, matching, **at)(context(policy), batch) for matching in ("official", "exact"))
    far = InvertedNoise(10, "official", timesteps=lambda ctx, batch: torch.tensor([501, 501]))(context(policy), batch)
    assert torch.equal(official.latents, far.latents)
    assert not torch.allclose(official.latents[0], exact.latents[0])


def test_official_matching_is_refused_for_flow():
    policy = ToyPolicy("flow")
    with pytest.raises(UserError, match="exact"):
        InPO(InPOConfig(level_matching="official")).draw(context(policy), image_batch(policy))


@pytest.mark.parametrize("process", PROCESSES)
def test_the_reference_may_invert_and_then_latents_do_not_follow_the_policy(process):
    moved, start = moved_policy(process), ToyPolicy(process)
    batch = image_batch(moved, examples=3)
    by_policy, by_reference = InvertedNoise(3), InvertedNoise(3, inverter="reference")
    assert torch.equal(by_reference(context(moved), batch).latents, by_policy(context(start), batch).latents)
    assert not torch.allclose(by_reference(context(moved), batch).latents, by_policy(context(moved), batch).latents)


@pytest.mark.parametrize("method", [InPO, SmPO])
def test_reference_values_may_be_cached_only_where_the_reference_inverts(method):
    assert method(method.Config()).spec.moving_reference
    assert not method(method.Config(inverter="reference")).spec.moving_reference


def test_the_policy_inverts_in_eval_mode_and_without_a_graph():
    policy = ToyPolicy()
    policy.module.train()
    seen, predict = [], policy.predict
    policy.predict = lambda *inputs: (seen.append((policy.module.training, torch.is_grad_enabled())), predict(*inputs))[
        1
    ]
    InPO(InPOConfig(num_inversion_steps=2)).draw(context(policy), image_batch(policy))
    assert set(seen) == {(False, False)}
    assert policy.module.training


@pytest.mark.parametrize("process", PROCESSES)
def test_with_fresh_noise_inpo_is_diffusion_dpo(process):
    policy = moved_policy(process)
    batch = image_batch(policy, examples=3)
    inpo, dpo = InPO(InPOConfig(beta=300.0)), DiffusionDPO(DiffusionDPOConfig(beta=300.0))
    inpo._kernel = DenoisingKernel(fresh_noise)
    assert torch.equal(step(inpo, context(policy), batch)[1].loss, step(dpo, context(policy), batch)[1].loss)


def test_two_equal_predictions_make_a_plain_move():
    policy = ToyPolicy()
    policy.predict = lambda latents, timesteps, condition: (
        0.1 * torch.cos(timesteps / 300).view(-1, 1, 1, 1).expand_as(latents)
    )
    batch = image_batch(policy, examples=3)
    plain, refined = (InvertedNoise(4, refinement=r)(context(policy), batch).latents for r in (None, TWO_PREDICTIONS))
    assert_close(refined, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{"num_inversion_steps": 0}, {"num_inversion_steps": 3, "inversion_eta": -0.1}])
def test_impossible_inversions_are_refused(options):
    with pytest.raises(UserError, match="inversion"):
        InPO(InPOConfig(**options))


# --- smoothed labels ----------------------------------------------------------------------------------------------


def test_an_undecided_pair_teaches_nothing():
    err = numbers(2).requires_grad_()
    output = objective(
        SmPO(SmPOConfig()), terms(err, numbers(2, seed=1)), examples(1, scores=torch.tensor([[0.2, 0.2]]))
    )
    assert output.loss.item() == pytest.approx(math.log(2))
    assert torch.autograd.grad(output.loss, err)[0].tolist() == [0.0, 0.0]


def test_a_decided_pair_counts_as_in_inpo():
    values, batch = terms(numbers(6), numbers(6, seed=1)), examples(3)
    inpo = objective(InPO(InPOConfig()), values, batch)
    assert_close(objective(SmPO(SmPOConfig(unscored="decided")), values, batch).loss, inpo.loss)
    config = SmPOConfig()
    gap = math.log((1 + 1 / config.gamma) / (1 - 1 / config.gamma)) * (config.score_high - config.score_low)
    scores = torch.tensor([[0.2 + gap, 0.2]] * 3, dtype=torch.float64)
    assert_close(objective(SmPO(config), values, examples(3, scores=scores)).loss, inpo.loss)


def test_published_size_of_the_weight():
    config = SmPOConfig()
    gap = winner_probability(torch.tensor(0.21), torch.tensor(0.20), config.score_low, config.score_high)
    assert label_weight(gap, config.gamma).item() == pytest.approx(0.300, abs=1e-3)


@given(st.floats(-0.1, 0.1), st.floats(0, 0.1), st.floats(0.001, 0.1))
@settings(max_examples=30, deadline=None)
def test_labels_depend_on_the_gap_alone_and_grow_with_it(shift, gap, more):
    low, score = torch.tensor(0.1, dtype=torch.float64), torch.tensor(0.2, dtype=torch.float64)
    here = winner_probability(score + gap, score, low, 0.3)
    assert_close(winner_probability(score + gap + shift, score + shift, low, 0.3), here)
    assert winner_probability(score + gap + more, score, low, 0.3) > here


def test_the_scorer_or_the_human_decides_who_won():
    values = terms(numbers(6), numbers(6, seed=1))
    batch = examples(3, scores=SCORES)
    scorer, human = (objective(SmPO(SmPOConfig(beta=20.0, order_by=who)), values, batch) for who in ("scorer", "human"))
    assert (scorer.metrics["label_weight"] > 0).all()
    assert human.metrics["logit"][2] == 0
    assert_close(scorer.metrics["logit"][:2], human.metrics["logit"][:2])
    swapped = terms(*(value[[0, 1, 5, 3, 4, 2]] for value in (numbers(6), numbers(6, seed=1))))
    ordered = examples(3, scores=SCORES.sort(dim=1, descending=True).values)
    assert_close(objective(SmPO(SmPOConfig(beta=20.0)), swapped, ordered).loss, scorer.loss)


@pytest.mark.parametrize("fields", [{}, {"scores": torch.tensor([[0.2, 0.1], [0.2, math.nan], [0.3, 0.1]])}])
def test_missing_scores_are_named(fields):
    values = terms(numbers(6), numbers(6, seed=1))
    with pytest.raises(UserError, match="example-1" if fields else "example-0"):
        objective(SmPO(SmPOConfig()), values, examples(3, **fields))
    weights = objective(SmPO(SmPOConfig(unscored="decided")), values, examples(3, **fields)).metrics["label_weight"]
    assert weights[1] == 1


def test_a_row_without_scores_costs_the_others_nothing():
    """One pair of a data set lacks scores: it counts as decided, the others by theirs."""
    rows = [{"prompt": "x", "images": [encoded(2 * i), encoded(2 * i + 1)], "winner": 0} for i in range(3)]
    found = [None if i == 1 else SCORES[i].tolist() for i in range(3)]
    pairs = load_examples([{**row, "scores": scores} for row, scores in zip(rows, found, strict=True)], "pairs")
    with pytest.raises(UserError, match=r"'row-1' \(1 of 3 pairs\) has none"):
        SmPO(SmPOConfig()).check_examples(pairs.examples)
    strategy = SmPO(SmPOConfig(unscored="decided", order_by="human"))
    strategy.check_examples(pairs.examples)
    values = terms(numbers(6), numbers(6, seed=1))
    batch = examples(3, **field_tensors(pairs.examples, torch.device("cpu")))
    weights = objective(strategy, values, batch).metrics["label_weight"]
    alone = examples(2, scores=SCORES[[0, 2]])
    known = objective(strategy, terms(numbers(4), numbers(4, seed=1)), alone).metrics["label_weight"]
    assert_close(weights, torch.stack([known[0], torch.ones_like(known[0]), known[1]]))


@pytest.mark.parametrize("options", [{"score_low": 0.3, "score_high": 0.2}, {"gamma": 0.0}])
def test_impossible_labels_are_refused(options):
    with pytest.raises(UserError):
        SmPOConfig(**options)


def test_rows_of_a_piece_are_rows_of_the_whole():
    policy = moved_policy()
    batch, ctx, strategy = image_batch(policy, examples=3), context(policy), InPO(InPOConfig(num_inversion_steps=2))
    draws = strategy.draw(ctx, batch)
    parts = [strategy.terms(ctx, batch, draws, Piece(rows=slice(start, start + 2))) for start in (0, 2, 4)]
    assert_close(torch.cat(parts), strategy.terms(ctx, batch, draws, Piece()))
