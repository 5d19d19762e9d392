"""Inversion-DPO: the path, its evenness at the reference, and the warm start that breaks it."""

import math
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from diffalign.diffusion.process import DiscreteProcess
from diffalign.errors import UserError
from diffalign.strategies.base import Progress
from diffalign.strategies.inversion_dpo import InversionDPO, InversionDPOConfig
from tests.battery.methods import CountingPolicy, gradient
from tests.factories import ToyPolicy, image_batch
from tests.golden_cases.scripted import evaluate
from tests.strategies.support import context, moved_policy

PROCESSES = ["epsilon", "v_prediction", "flow"]
SHORT = InversionDPOConfig(beta=20.0, num_inversion_steps=3, warm_start_steps=0)
DELTA = (0.05, -0.04)


def loss(policy, config=SHORT, batch=None, **options):
    strategy, ctx = InversionDPO(config), context(policy, **options)
    batch = image_batch(policy, examples=2) if batch is None else batch
    return evaluate(strategy, ctx, batch, strategy.draw(ctx, batch))[0]


@pytest.mark.parametrize("process", PROCESSES)
def test_opposite_steps_from_the_reference_cost_the_same_and_pull_apart(process):
    results = []
    for sign in (1, -1):
        policy = CountingPolicy(process, tuple(sign * d for d in DELTA), double=True)
        batch = image_batch(policy, examples=2)
        batch = replace(batch, latents=batch.latents.double())
        slope, account = gradient(InversionDPO(SHORT), policy, [batch])
        results.append((account.sums["loss"], slope))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], -results[1][1])
    assert results[0][1].abs().max() > 0


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("path", ["reference", "policy"])
def test_the_sign_turns_the_logit_and_nothing_is_random(process, path):
    policy = moved_policy(process)
    batch = image_batch(policy, examples=2)
    plus, minus = (loss(policy, replace(SHORT, path=path, sign=sign), batch) for sign in (1, -1))
    assert_close(minus.metrics["logit"], -plus.metrics["logit"])
    assert_close(minus.metrics["winner_margin"], -plus.metrics["winner_margin"])
    assert torch.equal(loss(policy, replace(SHORT, path=path), replace(batch, seeds=batch.seeds + 1)).loss, plus.loss)


def test_whose_path_it_is_matters():
    policy = moved_policy()
    batch = image_batch(policy, examples=2)
    reference, own = (
        InversionDPO(replace(SHORT, path=path)).draw(context(policy), batch).path for path in ("reference", "policy")
    )
    assert torch.equal(reference.latents[:4], own.latents[:4])
    assert not torch.allclose(reference.latents[-4:], own.latents[-4:])
    assert_close(own.reference[:4], reference.reference[:4])


def test_guidance_is_idle_where_the_empty_caption_says_the_same():
    policy = moved_policy()
    batch = image_batch(policy, examples=2)
    silent = batch.with_conditions((policy.null_condition(2),) * 2)
    both = [loss(policy, replace(SHORT, inversion_guidance_scale=g), silent).loss for g in (1.0, 3.0)]
    assert_close(*both)
    spoken = [loss(policy, replace(SHORT, inversion_guidance_scale=g), batch).loss for g in (1.0, 3.0)]
    assert not torch.allclose(*spoken)


def test_rows_of_supervised_images_are_weighted_where_the_images_are():
    policy = CountingPolicy()
    strategy, ctx, batch = (
        InversionDPO(replace(SHORT, sft_weight=0.5)),
        context(policy),
        image_batch(policy, examples=2),
    )
    draws = strategy.draw(ctx, batch)
    elsewhere = replace(draws, batch=replace(draws.batch, latents=draws.batch.latents.to("meta")))
    weights = strategy.frozen(ctx, batch, elsewhere, strategy.pieces(ctx, batch, draws)[-1])["path_weight"]
    assert (weights.shape, weights.device.type) == ((2, 1), "meta")


@pytest.mark.parametrize("moves", [2, 3])
@pytest.mark.parametrize("sft_weight", [0.0, 0.5])
def test_pieces_of_any_length_give_the_same_gradient(moves, sft_weight):
    slopes = []
    for size in (1, moves):
        policy = CountingPolicy(delta=DELTA, double=True)
        batch = image_batch(policy, examples=2)
        batch = replace(batch, latents=batch.latents.double())
        config = replace(SHORT, moves_per_piece=size, sft_weight=sft_weight)
        slopes.append(gradient(InversionDPO(config), policy, [batch])[0])
        assert policy.calls["trained"] == math.ceil(3 / size) + (1 if sft_weight else 0)
    assert_close(slopes[0], slopes[1])


@pytest.mark.parametrize(("objective", "images"), [("sft", 1), ("diffusion_dpo", 2)])
def test_the_warm_start_is_another_objective_by_name(objective, images):
    policy = CountingPolicy()
    batch = image_batch(policy, examples=2)
    strategy = InversionDPO(replace(SHORT, warm_start=objective, warm_start_steps=5))
    for step, warm in ((0, 1.0), (4, 1.0), (5, 0.0)):
        policy.calls.clear()
        _, account = gradient(strategy, policy, [batch], progress=Progress(step))
        assert account.sums["warm_start"] == warm * 2
        if warm:
            assert policy.calls == {"trained": 1, **({"reference": 1} if images == 2 else {})}
            assert policy.trained_rows == 2 * images


def test_velocity_and_noise_predictions_of_one_function_agree():
    """A v network that stands for the same noise gives the same D, converted at the level of the latents."""
    plain, other = moved_policy("epsilon"), moved_policy("epsilon")
    other.process = DiscreteProcess(plain.process.alphas_cumprod, "v_prediction", steps_offset=1)
    noise = other.predict

    def velocity(latents, timesteps, condition):
        ladder = InversionDPO(SHORT).draw(context(plain), batch).path
        row = (ladder.timesteps == timesteps[0]).nonzero()[0]
        level = ladder.levels.select(row)
        epsilon = noise(latents, timesteps, condition)
        x0 = plain.process.to_x0(epsilon, latents, level)
        return other.process.from_x0_epsilon(x0, epsilon, level)

    batch = image_batch(plain, examples=2)
    config = replace(SHORT, inversion_guidance_scale=1.0)
    expected = loss(plain, config, batch)
    other.predict = velocity
    assert_close(loss(other, config, batch).loss, expected.loss, rtol=1e-4, atol=1e-5)


def test_a_path_that_ends_without_an_image_is_refused():
    policy = ToyPolicy("v_prediction")
    abar = policy.process.alphas_cumprod.clone()
    abar[-1] = 0
    policy.process = DiscreteProcess(abar, "v_prediction", timestep_spacing="trailing")
    with pytest.raises(UserError, match="leading"):
        InversionDPO(SHORT).draw(context(policy), image_batch(policy))


@pytest.mark.parametrize("name", ["num_inversion_steps", "moves_per_piece", "warm_start_steps"])
def test_impossible_options_are_refused(name):
    with pytest.raises(UserError, match=name):
        InversionDPOConfig(**{name: -1})
