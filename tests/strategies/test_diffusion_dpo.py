"""Diffusion-DPO and plain fine-tuning: what is drawn, and which options exclude each other."""

import pytest
import torch
from torch.testing import assert_close

from diffalign.errors import UserError
from diffalign.strategies.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from diffalign.strategies.sft import SFT, SFTConfig
from tests.factories import ToyPolicy
from tests.strategies.support import context, image_batch, moved_policy, step

PROCESSES = ["epsilon", "v_prediction", "flow"]


@pytest.mark.parametrize("process", PROCESSES)
def test_a_pair_shares_timestep_and_noise_but_not_the_target_of_v_and_flow(process):
    policy = ToyPolicy(process)
    batch = image_batch(policy, examples=3)
    draws = DiffusionDPO(DiffusionDPOConfig()).draw(context(policy), batch)
    chosen, rejected = draws.timesteps.chunk(2)
    assert torch.equal(chosen, rejected)
    level = policy.process.level(draws.timesteps)
    noise = policy.process.noise_from(draws.latents, batch.latents, level)
    assert_close(noise[:3], noise[3:], rtol=1e-3, atol=1e-3)
    assert torch.equal(draws.target[:3], draws.target[3:]) == (process == "epsilon")
    assert len(set(chosen.tolist())) == 3


def test_draws_depend_on_the_examples_seed_alone():
    policy = ToyPolicy()
    batch = image_batch(policy, examples=3)
    strategy = DiffusionDPO(DiffusionDPOConfig())
    first, again = strategy.draw(context(policy), batch), strategy.draw(context(policy), batch)
    assert torch.equal(first.latents, again.latents)
    assert torch.equal(first.timesteps, again.timesteps)


@pytest.mark.parametrize("process", PROCESSES)
def test_distilled_models_train_on_the_timesteps_they_know(process):
    policy = ToyPolicy(process)
    batch = image_batch(policy, examples=40)
    drawn = DiffusionDPO(DiffusionDPOConfig(few_step_timesteps=4)).draw(context(policy), batch).timesteps
    expected = policy.process.timestep_at(torch.tensor([249, 499, 749, 999]))
    assert set(drawn.tolist()) == set(expected.tolist())


def test_label_smoothing_pulls_a_satisfied_pair_back():
    policy = moved_policy()
    batch = image_batch(policy, examples=3)
    plain, smooth = (
        step(DiffusionDPO(DiffusionDPOConfig(beta=20.0, label_smoothing=s)), context(policy), batch)[1]
        for s in (0, 0.2)
    )
    z = plain.metrics["logit"]
    assert_close(smooth.metrics["loss"], plain.metrics["loss"] + 0.2 * z)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 0.7}, "probability"),
        ({"label_smoothing": 0.1, "head": "hinge"}, "sigmoid head"),
        ({"few_step_timesteps": -1}, "few_step_timesteps"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        DiffusionDPOConfig(**options)


@pytest.mark.parametrize("process", PROCESSES)
def test_fine_tuning_needs_no_reference(process):
    policy = moved_policy(process)
    batch = image_batch(policy, examples=3, images=1)
    terms, output = step(SFT(SFTConfig()), context(policy, with_reference=False), batch)
    assert not terms.frozen
    assert_close(output.loss, terms.policy.mean())


def test_a_network_that_predicts_nothing_errs_by_the_target():
    policy = ToyPolicy("flow", weight=(0.0, 0.0))
    batch = image_batch(policy, examples=2, images=1)
    strategy = SFT(SFTConfig())
    draws = strategy.draw(context(policy), batch)
    errors = strategy.terms(context(policy), batch, draws, strategy.pieces(context(policy), batch, draws)[0])
    assert_close(errors[:, 0], draws.target.square().mean(dim=(1, 2, 3)))
