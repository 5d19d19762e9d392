"""DCPO and TDPO: two captions in place of one, on two images or on one."""

import math
from dataclasses import replace

import pytest
import torch

from diffalign.batch import Condition
from diffalign.errors import UserError
from diffalign.strategies.base import Piece
from diffalign.strategies.dcpo import DCPO, DCPOConfig, with_common_captions
from diffalign.strategies.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from diffalign.strategies.tdpo import TDPO, TDPOConfig
from tests.strategies.support import context, examples, image_batch, moved_policy, numbers, objective, step, terms

STRATEGIES = [DCPO(DCPOConfig(beta=20.0)), TDPO(TDPOConfig(beta=20.0))]
PROCESSES = ["epsilon", "v_prediction", "flow"]


def one_image_two_captions(policy, examples=3):
    batch = image_batch(policy, examples=examples, own_captions=True)
    return replace(batch, latents=batch.latents[:examples].repeat(2, 1, 1, 1))


def swapped(batch, images=True, captions=True):
    latents = batch.latents.roll(batch.size, 0) if images else batch.latents
    return replace(batch, latents=latents, conditions=batch.conditions[::-1] if captions else batch.conditions)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_at_the_reference_the_loss_is_log_two(strategy):
    err = numbers(6)
    output = objective(strategy, terms(err, err), examples(3))
    assert output.loss.item() == pytest.approx(math.log(2))
    assert output.metrics["logit"].tolist() == [0, 0, 0]
    assert output.metrics["implicit_accuracy"].tolist() == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_gradients_by_finite_differences(strategy):
    err, ref_err = numbers(6).requires_grad_(), numbers(6, seed=1)
    assert torch.autograd.gradcheck(lambda e: objective(strategy, terms(e, ref_err), examples(3)).loss, err)


@pytest.mark.parametrize("process", PROCESSES)
def test_dcpo_with_one_caption_is_diffusion_dpo(process):
    policy = moved_policy(process)
    batch = image_batch(policy, examples=3)
    results = []
    for strategy in (DCPO(DCPOConfig(beta=300.0)), DiffusionDPO(DiffusionDPOConfig(beta=300.0))):
        policy.module.delta["default"].grad = None
        _, output = step(strategy, context(policy), batch)
        output.loss.backward()
        results.append((output.loss, policy.module.delta["default"].grad.clone()))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_a_share_of_pairs_keeps_the_common_caption():
    policy = moved_policy("epsilon")
    batch = image_batch(policy, examples=64, own_captions=True)
    chosen, rejected = (condition.tensors["prompt_embeds"] for condition in batch.conditions)
    mixed = with_common_captions(batch, 0.25)
    own, other = (condition.tensors["prompt_embeds"] for condition in mixed.conditions)
    common = (other == chosen).flatten(1).all(1)
    assert torch.equal(own, chosen)
    assert torch.equal(other[~common], rejected[~common])
    assert 8 <= common.sum() <= 24
    assert torch.equal(with_common_captions(batch, 0.25).condition.tensors["prompt_embeds"], torch.cat([own, other]))
    with pytest.raises(UserError, match="share from 0 to 1"):
        DCPOConfig(common_caption_share=1.5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_share_leads_from_the_paper_to_diffusion_dpo(share):
    policy = moved_policy("epsilon")
    batch = image_batch(policy, examples=3, own_captions=True)
    plain = batch if share == 0 else replace(batch, conditions=(batch.conditions[0],) * 2)
    mixed = step(DCPO(DCPOConfig(beta=20.0, common_caption_share=share)), context(policy), batch)[1].loss
    assert torch.equal(mixed, step(DiffusionDPO(DiffusionDPOConfig(beta=20.0)), context(policy), plain)[1].loss)


@pytest.mark.parametrize("process", PROCESSES)
def test_dcpo_on_one_image_is_tdpo(process):
    policy = moved_policy(process)
    batch = one_image_two_captions(policy)
    both = [step(s, context(policy), batch)[1].loss for s in (DCPO(DCPOConfig(beta=20.0)), TDPO(TDPOConfig(beta=20.0)))]
    assert torch.equal(both[0], both[1])


@pytest.mark.parametrize("process", PROCESSES)
def test_swapping_images_and_captions_flips_the_logit_but_captions_alone_do_not(process):
    policy, strategy = moved_policy(process), DCPO(DCPOConfig())
    batch = image_batch(policy, examples=3, own_captions=True)
    logit, back, mixed = (
        step(strategy, context(policy), b)[1].metrics["logit"]
        for b in (batch, swapped(batch), swapped(batch, images=False))
    )
    torch.testing.assert_close(back, -logit)
    assert not torch.allclose(mixed, logit)
    assert not torch.allclose(mixed, -logit)


def test_each_row_is_seen_under_its_own_caption():
    policy = moved_policy()
    batch = image_batch(policy, examples=3, own_captions=True)
    draws = DCPO(DCPOConfig()).draw(context(policy), batch)
    expected = torch.cat([condition.tensors["prompt_embeds"] for condition in batch.conditions])
    assert torch.equal(draws.condition.tensors["prompt_embeds"], expected)
    assert not torch.equal(expected[:3], expected[3:])


@pytest.mark.parametrize("process", PROCESSES)
def test_tdpo_sees_one_noisy_image_twice(process):
    policy = moved_policy(process)
    draws = TDPO(TDPOConfig()).draw(context(policy), one_image_two_captions(policy))
    for value in (draws.latents, draws.target, draws.timesteps):
        first, second = value.chunk(2)
        assert torch.equal(first, second)


@pytest.mark.parametrize("process", PROCESSES)
def test_tdpo_with_equal_captions_has_no_gradient(process):
    policy = moved_policy(process)
    batch = one_image_two_captions(policy)
    batch = replace(batch, conditions=(batch.conditions[0],) * 2)
    _, output = step(TDPO(TDPOConfig()), context(policy), batch)
    output.loss.backward()
    assert output.metrics["logit"].tolist() == [0, 0, 0]
    assert policy.module.delta["default"].grad.abs().max() < 1e-6 * TDPOConfig().beta


def test_tdpo_swapping_captions_flips_the_logit_and_reports_the_prompt_margin():
    policy, strategy = moved_policy(), TDPO(TDPOConfig())
    batch = one_image_two_captions(policy)
    _, first = step(strategy, context(policy), batch)
    _, second = step(strategy, context(policy), swapped(batch, images=False))
    torch.testing.assert_close(first.metrics["logit"], -second.metrics["logit"])
    gap = first.metrics["policy_error_rejected"] - first.metrics["policy_error_chosen"]
    torch.testing.assert_close(first.metrics["prompt_margin"], gap)


def test_tdpo_says_where_the_text_encoder_sees_no_difference():
    policy, strategy = moved_policy(), TDPO(TDPOConfig())
    batch = one_image_two_captions(policy)
    right, wrong = (
        torch.tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 0.0]]),
        torch.tensor([[3.0, 4.0], [0.0, 2.0], [-1.0, 0.0]]),
    )
    shown = replace(batch, conditions=tuple(Condition({"prompt_embeds": rows[:, None]}) for rows in (right, wrong)))
    values, _ = step(strategy, context(policy), batch)
    cosines = strategy.loss(values, {}, shown).metrics["caption_cosine"]
    torch.testing.assert_close(cosines, torch.tensor([1.0, 0.0, -1.0]))


def test_a_scaled_rejected_gradient_and_supervision_reach_the_objective():
    err, ref_err = numbers(6).requires_grad_(), numbers(6, seed=1)
    options = {"sft_weight": 2.0, "rejected_gradient_scale": 0.0}
    objective(TDPO(TDPOConfig(beta=20.0)), terms(err, ref_err), examples(3)).loss.backward()
    plain, err.grad = err.grad, None
    objective(TDPO(TDPOConfig(beta=20.0, **options)), terms(err, ref_err), examples(3)).loss.backward()
    torch.testing.assert_close(err.grad[:3], plain[:3] + 2 / 3)
    assert not err.grad[3:].any()


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_evaluations_a_step(strategy, monkeypatch):
    policy = moved_policy()
    calls, predict = [], policy.predict
    monkeypatch.setattr(policy, "predict", lambda x, t, c: calls.append(len(x)) or predict(x, t, c))
    batch, ctx = one_image_two_captions(policy), context(policy)
    draws = strategy.draw(ctx, batch)
    strategy.frozen(ctx, batch, draws, Piece())
    strategy.terms(ctx, batch, draws, Piece())
    assert calls == [6, 6]
