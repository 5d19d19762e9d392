"""AlignProp, DRaFT and ReFL: what carries a gradient, how it is drawn, and that the reward rises."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from diffalign.diffusion.guidance import guided
from diffalign.diffusion.random import randn_rows
from diffalign.diffusion.sampling import sample
from diffalign.errors import UserError
from diffalign.rewards.base import Reward
from diffalign.rewards.function import FunctionReward
from diffalign.rewards.loading import load_reward
from diffalign.strategies.alignprop import AlignProp, AlignPropConfig, draw_truncation, live_steps
from diffalign.strategies.base import Piece, Progress
from diffalign.strategies.draft_k import DraftK, DraftKConfig
from diffalign.strategies.draft_lv import DraftLV, DraftLVConfig
from diffalign.strategies.refl import ReFL, ReFLConfig, draw_jump
from diffalign.strategies.reno import ReNO, ReNOConfig
from diffalign.strategies.reward_gradient import reward_loss
from diffalign.training.processes import Processes
from diffalign.training.update import GradientPass
from tests.battery.methods import CountingPolicy, batch_for, context, gradient, make
from tests.factories import tiny_sd

METHODS = ["alignprop", "draft_k", "draft_lv", "refl"]
MOVED = (0.05, -0.04)
every_method = pytest.mark.parametrize("name", METHODS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def constant(value: float) -> dict:
    reward = FunctionReward(
        lambda images, prompts: images.flatten(1).sum(1) * 0 + value / 2, "flat", differentiable=True
    )
    return {"rewards": {"flat": reward}, "reward_weights": {"flat": 2.0}}


def test_forms_of_the_loss():
    rewards = torch.tensor([-1.0, 1.0, 3.0])
    assert reward_loss(rewards, "linear").tolist() == [1, -1, -3]
    assert reward_loss(rewards, "distance", 2.0).tolist() == [3, 1, 1]
    assert reward_loss(rewards, "hinge", 2.0).tolist() == [3, 1, 0]
    with pytest.raises(UserError, match="hinge"):
        reward_loss(rewards, "hing")  # type: ignore[arg-type]


def test_truncations_stay_between_the_first_and_the_last_step():
    draws = [draw_truncation("gaussian", 50, source) for source in [generator()] for _ in range(10_000)]
    assert min(draws) >= 1
    assert max(draws) <= 49
    assert sum(draws) / len(draws) == pytest.approx(40.9, abs=0.15)  # rounded down, cut above 49
    wide = [draw_truncation("gaussian", 4, source, std=2.0) for source in [generator()] for _ in range(500)]
    assert set(wide) == {1, 2, 3}
    uniform = [draw_truncation("uniform", 5, source) for source in [generator()] for _ in range(500)]
    assert set(uniform) == {1, 2, 3, 4}
    assert draw_truncation("fixed", 50, generator(), mean=0.98) == 49
    assert draw_truncation("fixed", 50, generator(), mean=0.999) == 49
    with pytest.raises(UserError, match="gaussian"):
        draw_truncation("gauss", 50, generator())  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"0\.0% of the draws fall on steps 1 to 3 of 4"):
        draw_truncation("gaussian", 4, generator(), mean=0.1, std=0.01)


def test_truncation_is_drawn_for_the_trajectory_or_for_each_step():
    policy = CountingPolicy()
    once = AlignProp(AlignPropConfig(rollout_steps=20, truncation="uniform"))
    plans = [once.kernel().plan(context(policy, once, progress=Progress(step))) for step in range(30)]
    assert all(plan == sorted(plan) and any(plan) and not all(plan) for plan in plans)
    assert len({tuple(plan) for plan in plans}) > 5
    assert plans[3] == once.kernel().plan(context(policy, once, progress=Progress(3)))  # as after a resume
    each = AlignProp(AlignPropConfig(rollout_steps=20, truncation="uniform", truncation_draw="step"))
    plans = [each.kernel().plan(context(policy, each, progress=Progress(step))) for step in range(30)]
    assert any(plan != sorted(plan) for plan in plans)
    assert all(plan[-1] for plan in plans)
    assert live_steps([3, 1, 1, 4]) == [False, True, True, False]


def test_jumps_start_late():
    draws = {draw_jump(40, 0.75, source) for source in [generator()] for _ in range(1000)}
    assert draws == set(range(30, 40))
    assert draw_jump(1, 0.75, generator()) == 0


@every_method
def test_samples_do_not_depend_on_what_carries_a_gradient(name):
    """And at the start they are those of the plain sampler with the model's own weights."""
    policy = tiny_sd(lora=True)
    strategy = make(name, eta=0.0, **({"rollout_steps": 4} if name == "alignprop" else {}))
    batch, ctx = batch_for(name, policy, examples=2), context(policy, strategy)
    kernel = strategy.kernel()
    draws = kernel.draw(ctx, batch)
    steps = strategy.config.rollout_steps
    noise = randn_rows(batch.seeds, batch.latents.shape[1:], "rollout-start", ctx.device)
    with torch.no_grad(), policy.adapters.disabled():
        expected = sample(guided(policy.predict, batch.condition), policy.process, noise, steps)
    if name in ("alignprop", "draft_k"):
        assert_close(kernel.arrive(ctx, draws).detach(), expected, rtol=1e-4, atol=1e-5)
    elif name == "refl":
        assert draws.step == steps - 1
        # the last move of this sampler ends at timestep 0, whose noise the jump leaves out
        assert_close(kernel.arrive(ctx, draws).detach(), expected, rtol=0.1, atol=0.1)
    else:
        assert draws.step == steps - 1
        assert len(draws.latents) == 2 * batch.size


@every_method
def test_only_adapters_learn_and_a_small_step_raises_the_reward(name):
    policy = tiny_sd(lora=True)
    strategy, batch = make(name), batch_for(name, policy, examples=2)
    ctx = context(policy, strategy)
    draws = strategy.draw(ctx, batch)

    def value():
        return strategy.loss(_terms(strategy, ctx, batch, draws), {}, batch)

    first = value()
    first.loss.backward()
    own = policy.adapters.parameters()
    assert {id(p) for p in policy.module.parameters() if p.grad is not None} == {id(p) for p in own}
    norm = torch.stack([p.grad.norm() for p in own]).norm()
    with torch.no_grad():
        for parameter in own:
            parameter -= 0.05 * parameter.grad / norm
    assert value().metrics["reward"].mean() > first.metrics["reward"].mean()


def _terms(strategy, ctx, batch, draws):
    from diffalign.strategies.base import Terms

    return Terms(strategy.terms(ctx, batch, draws, Piece()))


@every_method
def test_a_constant_reward_gives_no_gradient(name):
    policy = CountingPolicy(delta=MOVED)
    slope, account = gradient(make(name), policy, [batch_for(name, policy)], **constant(1.0))
    assert slope.abs().max() == 0
    assert account.sums["reward"].item() == pytest.approx(4.0)


class Remembering(Reward):
    """A scorer that keeps what it was shown and what it said."""

    def __init__(self) -> None:
        self.scorer = load_reward("tiny-pickscore", torch.device("cpu"))
        self.info, self.calls = self.scorer.info, []

    def score(self, images, prompts, metadata=None):
        scores = self.scorer.score(images, prompts, metadata)
        self.calls.append((images.detach(), list(prompts), scores.detach()))
        return scores


@pytest.mark.parametrize("name", [*METHODS, "reno"])
def test_rewards_keep_their_own_precision_in_a_run_of_mixed_precision(name):
    policy, reward = tiny_sd(lora=True), Remembering()
    batch = replace(batch_for("alignprop", policy, examples=2), prompts=["a red cube", "two cats"])
    strategy = ReNO(ReNOConfig(iterations=1)) if name == "reno" else make(name)
    ctx = context(policy, strategy, rewards={"judge": reward}, global_batch=2)
    trained = [p for group in strategy.parameters() for p in group.parameters] or list(policy.adapters.parameters())
    update = next(iter(strategy.collect(ctx, [batch])))
    GradientPass(strategy, ctx, trained, Processes(), torch.bfloat16)(update)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in trained)
    assert reward.calls
    for images, prompts, scores in reward.calls:
        assert_close(scores, reward.scorer.score(images, prompts), rtol=0, atol=1e-5)


def test_above_its_target_refl_leaves_the_model_alone():
    config = ReFLConfig(rollout_steps=4, reward_target=2.0)
    policy, strategy = CountingPolicy(delta=MOVED), ReFL(config)
    batch = batch_for("refl", policy)
    for value, loss in ((2.5, 0.0), (0.5, 1.5e-3 * batch.size)):
        slope, account = gradient(strategy, policy, [batch], **constant(value))
        assert slope.abs().max() == 0
        assert account.sums["loss"].item() == pytest.approx(loss)
    assert {"zero_loss", "zero_gradient"} <= strategy.spec.waived_guards.keys()
    assert not ReFL(replace(config, loss_form="linear")).spec.waived_guards


def test_draft_with_k_steps_is_alignprop_with_a_fixed_truncation():
    shared = {"rollout_steps": 5, "rollout_guidance_scale": 2.0, "eta": 0.3, "loss_scale": 0.5}
    alignprop = AlignProp(AlignPropConfig(**shared, truncation="fixed", truncation_mean=0.6))
    draft = DraftK(DraftKConfig(**shared, gradient_steps=2))
    slopes = []
    for strategy in (alignprop, draft):
        policy = CountingPolicy(delta=MOVED)
        slopes.append(gradient(strategy, policy, [batch_for("draft_k", policy)])[0])
        assert policy.calls == {"policy": 3, "trained": 4}
    assert_close(slopes[0], slopes[1])
    assert slopes[0].abs().max() > 0


def test_the_whole_chain_can_carry_a_gradient():
    policy = CountingPolicy(delta=MOVED)
    gradient(DraftK(DraftKConfig(rollout_steps=3, gradient_steps=3)), policy, [batch_for("draft_k", policy)])
    assert policy.calls == {"trained": 6}


def test_noisings_of_an_image_are_averaged():
    policy = CountingPolicy(delta=MOVED)
    strategy = DraftLV(DraftLVConfig(rollout_steps=3, rollout_guidance_scale=1.0, noisings=3))
    batch, ctx = batch_for("draft_lv", policy), context(policy, strategy)
    draws = strategy.draw(ctx, batch)
    assert len(draws.latents) == 3 * batch.size
    assert draws.prompts == list(batch.prompts) * 3
    blocks = draws.latents.chunk(3)
    assert not torch.equal(blocks[0], blocks[1])
    terms = _terms(strategy, ctx, batch, draws)
    output = strategy.loss(terms, {}, batch)
    assert_close(output.loss, -terms.policy.mean())
    assert_close(output.metrics["reward"], terms.policy.detach().view(3, -1).mean(0))


def test_refl_can_denoise_winners_besides():
    strategy = ReFL(ReFLConfig(rollout_steps=3, rollout_guidance_scale=1.0, pretraining_weight=0.5))
    assert strategy.spec.data == "winners"
    policy = CountingPolicy(delta=MOVED)
    batch, ctx = batch_for("sft", policy), context(policy, strategy)
    terms = _terms(strategy, ctx, batch, strategy.draw(ctx, batch))
    sft = make("sft")
    errors = sft.terms(ctx, batch, sft.draw(ctx, batch), Piece())
    assert_close(terms.policy[:, 1:], errors)
    reward_only = ReFL(ReFLConfig(rollout_steps=3, rollout_guidance_scale=1.0))
    expected = reward_only.loss(replace(terms, policy=terms.policy[:, :1]), {}, batch).loss + 0.5 * errors.mean()
    output = strategy.loss(terms, {}, batch)
    assert_close(output.loss, expected)
    assert_close(output.metrics["loss"].mean(), output.loss.detach())


@every_method
def test_distance_from_the_reference_can_be_penalised(name):
    policy = CountingPolicy(delta=MOVED)
    strategy, plain = make(name, reference_weight=0.5), make(name)
    assert strategy.spec.needs_reference
    assert not plain.spec.needs_reference
    batch, ctx = batch_for(name, policy), context(policy, strategy)
    draws = strategy.draw(ctx, batch)
    terms = _terms(strategy, ctx, batch, draws)
    timestep = policy.process.sampling_grid(strategy.config.rollout_steps).timesteps[draws.step]
    arguments = draws.latents, timestep.expand(len(draws.latents)), draws.condition
    with torch.no_grad():
        moved = policy.predict(*arguments)
        with policy.adapters.disabled():
            start = policy.predict(*arguments)
    assert_close(terms.policy[:, 1].detach(), (moved - start).square().flatten(1).mean(1))
    output = strategy.loss(terms, {}, batch)
    penalty = 0.5 * terms.policy[:, 1].mean()
    assert_close(output.loss, plain.loss(replace(terms, policy=terms.policy[:, :1]), {}, batch).loss + penalty)
    assert_close(output.metrics["reference_distance"].mean(), terms.policy[:, 1].detach().mean())
    flat, account = gradient(strategy, policy, [batch], **constant(1.0))
    assert flat.abs().max() > 0  # back to the start
    assert account.sums["reference_distance"] > 0


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (AlignPropConfig, {"rollout_steps": 1}, "2 steps"),
        (AlignPropConfig, {"eta": 1.5}, "eta"),
        (AlignPropConfig, {"truncation_mean": 42}, "share"),
        (AlignPropConfig, {"truncation_std": 0}, "truncation_std"),
        (AlignPropConfig, {"rollout_steps": 4, "truncation_mean": 0.1, "truncation_std": 0.01}, "steps 1 to 3 of 4"),
        (AlignPropConfig, {"truncation_std": 50.0}, "truncation_std 50"),
        (DraftKConfig, {"gradient_steps": 51}, "gradient_steps"),
        (DraftKConfig, {"loss_scale": 0}, "loss_scale"),
        (DraftKConfig, {"reference_weight": -1.0}, "reference_weight"),
        (DraftLVConfig, {"noisings": 0}, "noisings"),
        (ReFLConfig, {"earliest_jump": 1.0}, "earliest_jump"),
        (ReFLConfig, {"pretraining_weight": -1}, "pretraining_weight"),
        (ReFLConfig, {"rollout_steps": 0}, "rollout_steps"),
    ],
)
def test_numbers_out_of_range_are_refused(config, options, message):
    with pytest.raises(UserError, match=message):
        config(**options)
