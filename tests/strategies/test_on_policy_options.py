"""Options of on-policy methods: estimators, penalties, gradients that are cut off, captions that are reworded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.diffusion.guidance import centred, guided
from diffalign.errors import UserError
from diffalign.inference.generate import generate
from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.combine import Normalised, ParetoRank, WinRate
from diffalign.rewards.function import FunctionReward
from diffalign.rewards.judges import PairJudge
from diffalign.rewards.vlm import Answer, NotAnswered, Question, Transcript, VisionLanguageModel
from diffalign.rollouts.judged import Judged
from diffalign.rollouts.rollout import Rollout, RolloutConfig, Rollouts
from diffalign.rollouts.steps import StochasticSteps
from diffalign.rollouts.updates import assign, trained_steps
from diffalign.strategies.base import Terms
from diffalign.strategies.ddpo import DDPOConfig
from diffalign.strategies.parrot import Parrot, ParrotConfig
from diffalign.strategies.pref_grpo import group_win_rates
from diffalign.strategies.registry import get_method
from diffalign.strategies.standardised import Advantages, StandardisedConfig
from tests.battery.methods import CountingPolicy
from tests.battery.on_policy import NAMES, captions, collected, context, gradient, make
from tests.factories import ToyPolicy
from tests.golden_cases.on_policy import transition_batch

MOVED = (0.02, -0.03)


def judged(rewards: list[float], groups: list[int], valid: list[bool] | None = None) -> tuple[Tensor, Judged]:
    count = len(rewards)
    ok = torch.tensor(valid or [True] * count)
    table = torch.tensor(rewards)
    return table, Judged(
        torch.arange(count), torch.tensor(groups), torch.tensor(groups), table[:, None], ok, torch.arange(count)
    )


@pytest.mark.parametrize("kind", ["caption", "group", "batch"])
def test_failed_images_have_no_advantage_and_no_say(kind: Any) -> None:
    config = StandardisedConfig(advantage=kind, statistics_min_count=2)
    with_failure = Advantages(config)(*judged([1.0, 9.0, 2.0, 4.0], [0, 0, 0, 1], [True, False, True, True]))
    without = Advantages(config)(*judged([1.0, 2.0, 4.0], [0, 0, 1]))
    assert with_failure[1] == 0
    assert with_failure[[0, 2, 3]].tolist() == without.tolist()


def test_deviations_of_groups_may_be_those_of_dance_grpo() -> None:
    table, known = judged([0.0, 2.0, 5.0, 5.0, 11.0], [0, 0, 1, 1, 1])
    config = StandardisedConfig(advantage="group", advantage_std="group", advantage_unbiased=True)
    expected = [-1 / 2**0.5, 1 / 2**0.5, -2 / 12**0.5, -2 / 12**0.5, 4 / 12**0.5]
    torch.testing.assert_close(Advantages(config)(table, known), torch.tensor(expected))


def test_running_statistics_remember_captions_over_rollouts() -> None:
    estimator = Advantages(StandardisedConfig(statistics_min_count=4))
    first = estimator(*judged([0.0, 1.0, 5.0, 6.0], [0, 0, 1, 1]))
    assert first[1] < 0 < first[2]  # too few of each caption: the rollout decides
    second = estimator(*judged([0.0, 1.0, 5.0, 6.0], [0, 0, 1, 1]))
    torch.testing.assert_close(second, torch.tensor([-1.0, 1.0, -1.0, 1.0]), rtol=1e-4, atol=1e-4)


def test_trained_steps_leave_the_last_one_out_and_draw_for_each_image() -> None:
    seeds = torch.arange(50)
    assert trained_steps(seeds, RolloutConfig(), 4).tolist() == [[0, 1, 2, 3]] * 50
    assert trained_steps(seeds, RolloutConfig(train_last_step=False), 4).tolist() == [[0, 1, 2]] * 50
    drawn = trained_steps(seeds, RolloutConfig(trained_share=0.5), 4)
    assert drawn.shape == (50, 2)
    assert len({tuple(row) for row in drawn.tolist()}) > 3
    assert drawn.equal(trained_steps(seeds, RolloutConfig(trained_share=0.5), 4))
    first = RolloutConfig(trained_share=0.75, trained_steps="first", train_last_step=False)
    assert trained_steps(seeds, first, 4).tolist() == [[0, 1]] * 50


def test_updates_share_images_evenly() -> None:
    place = assign(torch.arange(10), 3, 0)
    assert sorted(torch.bincount(place).tolist()) == [3, 3, 4]
    assert not place.equal(assign(torch.arange(10), 3, 1))


def first_gradient(name: str, process: str = "epsilon", **options: Any) -> Tensor:
    policy = CountingPolicy(process, MOVED)
    strategy, ctx = make(name, **options), context(policy)
    gradient(strategy, ctx, collected(strategy, ctx, captions(policy))[0], [policy.trained])
    assert policy.trained.grad is not None
    return policy.trained.grad.clone()


def test_the_unconditional_branch_can_be_left_without_gradient() -> None:
    kept, cut = (first_gradient("flow_grpo", "flow", detach_unconditional=flag) for flag in (False, True))
    # guidance 2: the conditional branch counts twice, the other minus once; q[0] acts alike in both
    assert cut[0] == pytest.approx(2 * kept[0].item(), rel=0.2)
    torch.testing.assert_close(cut[1], kept[1], rtol=1e-2, atol=1e-5)


@pytest.mark.parametrize("process", ["epsilon", "flow"])
def test_a_penalty_pulls_towards_the_reference(process: str) -> None:
    policy = CountingPolicy(process, (0.3, 0.0))
    strategy = make("ddpo", kl_beta=1e4, kl_form="gaussian")
    ctx = context(policy)
    account = gradient(strategy, ctx, collected(strategy, ctx, captions(policy))[0], [policy.trained])
    assert account.sums["reference_kl"] > 0
    assert policy.trained.grad is not None
    assert policy.trained.grad[0] > 0  # descent lowers what was added to the first number
    released = (
        first_gradient("ddpo", process, kl_beta=1.0),
        first_gradient("ddpo", process, kl_beta=1.0, kl_form="gaussian"),
    )
    assert released[0].equal(released[1]) == (process == "epsilon")


def test_members_off_the_front_are_not_replayed() -> None:
    policy = ToyPolicy()
    updates = collected(make("parrot"), context(policy), captions(policy))
    batches = [batch for update in updates for batch in update.micro_batches]
    assert all((batch.fields["weight"] >= 1).all() for batch in batches)
    assert 0 < batches[0].figures["front_share"] <= 1
    rows, steps = sum(batch.size for batch in batches), 4
    assert rows <= batches[0].figures["front_share"] * 12 * steps + 1e-6


def test_rewards_of_different_scales_count_alike_in_parrot() -> None:
    """Groups are judged by different rewards: the deviation of one says nothing of the other."""
    verdict, pick = [0.0, 0.25, 0.75, 1.0], [21.2, 21.3, 21.5, 21.6]
    table = torch.tensor([[a, b] for a, b in zip(verdict * 2, pick * 2, strict=True)])
    groups, count = torch.tensor([0] * 4 + [1] * 4), len(table)
    known = Judged(torch.arange(count), groups, groups, table, torch.ones(count, dtype=torch.bool), torch.arange(count))
    rollout = Rollout(None, (), known, ("verdict", "pick"), (1.0, 1.0))
    first, second = make("parrot").advantages(rollout).split(4)  # type: ignore[attr-defined]
    for advantages in (first, second):
        assert float(advantages.std(correction=0)) == pytest.approx(1.0, abs=2e-3)


def test_estimators_are_options_of_those_who_ask_them() -> None:
    estimators = {"advantage", "advantage_std", "advantage_unbiased", "statistics_size", "statistics_min_count"}
    for name in NAMES:
        options = {f.name for f in fields(get_method(name).strategy.Config)}
        assert options & estimators == (estimators if name in ("ddpo", "flow_grpo") else set())


def test_the_score_function_of_parrot_knows_no_bounds_and_leaves_the_options_alone() -> None:
    log_ratio = torch.tensor([[0.4], [-0.4]], requires_grad=True)
    batch = transition_batch(advantage=torch.tensor([50.0, -50.0]), weight=torch.tensor([2.0, 1.0]))
    losses, slopes = {}, {}
    for objective in ("score_function", "clipped"):
        config = ParrotConfig(objective=objective, clip_range=0.1)  # type: ignore[arg-type]
        method = Parrot(config)
        assert method.config == config
        losses[objective] = method.loss(Terms(log_ratio), {}, batch).loss
        (slopes[objective],) = torch.autograd.grad(losses[objective], log_ratio)
    ratio = log_ratio.detach().exp()
    expected = torch.tensor([[-100.0], [50.0]]) * ratio / 2
    torch.testing.assert_close(losses["score_function"], expected.sum())
    torch.testing.assert_close(slopes["score_function"], expected)
    assert slopes["clipped"].tolist() == [[0.0], [0.0]]


def longer(prompts: list[str]) -> list[str]:
    return [f"{prompt}, detailed" for prompt in prompts]


def test_parrot_rewords_what_the_policy_sees_and_not_what_rewards_see() -> None:
    policy = ToyPolicy()
    batch = captions(policy, 2)[0]
    strategy = make("parrot", identifiers=True, expansion="tests.strategies.test_on_policy_options:longer")
    seen = strategy._worded(context(policy), batch)  # type: ignore[attr-defined]
    assert seen.prompts == batch.prompts
    expected = policy.encode_prompts(
        [f"<reward {k + 1}> {p}, detailed" for k, p in zip((0, 1), batch.prompts, strict=True)]
    )
    assert seen.condition.tensors["prompt_embeds"].equal(expected.tensors["prompt_embeds"])
    with pytest.raises(UserError, match="MODULE:FUNCTION"):
        make("parrot", expansion="no.such:thing")


def test_the_images_of_a_caption_are_judged_together() -> None:
    """Whatever fits into a pass of sampling: a reward may compare them."""
    policy = ToyPolicy()
    seen: list[list[str]] = []

    def judge(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(list(prompts))
        return images.flatten(1).mean(1)

    rollouts = {}
    for size in (3, 4, 9, 100):
        seen.clear()
        ctx = context(policy, {"judge": FunctionReward(judge, "judge")})
        engine = Rollouts(RolloutConfig(images_per_prompt=4, rollout_steps=2, rollout_batch_size=size))
        engine.open(ctx)
        rollouts[size] = engine(ctx, captions(policy, 3))
        assert all(Counter(prompts)[prompt] == 4 for prompts in seen for prompt in prompts)
    for rollout in rollouts.values():
        torch.testing.assert_close(rollout.judged.rewards, rollouts[100].judged.rewards)
        assert rollout.judged.own.equal(rollouts[100].judged.own)
        assert rollout.trajectories is not None
        bright = policy.decode(rollout.trajectories.final).flatten(1).mean(1)
        torch.testing.assert_close(bright, rollout.rewards[rollout.judged.own])


def test_duels_are_held_inside_groups() -> None:
    rates = group_win_rates(torch.tensor([1.0, 2.0, 9.0, 3.0, 3.0]), torch.tensor([0, 0, 1, 1, 1]))
    assert rates.tolist() == [0.0, 1.0, 1.0, 0.25, 0.25]


def test_a_rollout_says_how_many_answers_could_not_be_read(tmp_path: Path) -> None:
    class Mumbler(VisionLanguageModel):
        """Every other answer is no verdict."""

        name = "mumbler"

        def ask(self, questions: Sequence[Question]) -> list[Answer | NotAnswered]:
            return [Answer("Image 1 is better" if index % 4 < 2 else "well") for index in range(len(questions))]

    policy = ToyPolicy()
    judge = PairJudge(Transcript(Mumbler(), tmp_path / "answers.jsonl"))
    bright = FunctionReward(lambda images, prompts: images.flatten(1).mean(1), "bright")
    for reward in (judge, WinRate(judge), Normalised(judge), ParetoRank({"judge": judge, "bright": bright})):
        strategy = make("pref_grpo")
        rewards = {"bright": bright, "judge": reward}
        figures = collected(strategy, context(policy, rewards), captions(policy))[0].micro_batches[0].figures
        assert 0 < judge.unread < judge.answers
        assert figures["unread_answers"] == pytest.approx(judge.unread / judge.answers)
    assert (
        "unread_answers" not in collected(make("ddpo"), context(policy), captions(policy))[0].micro_batches[0].figures
    )


def test_centred_guidance_of_one_caption_is_ordinary_guidance() -> None:
    policy, latents, times = ToyPolicy(), torch.ones(2, 3, 4, 4), torch.full((2,), 500)
    condition, null = policy.encode_prompts(["a b", "a c"]), policy.null_condition(2)
    got = centred(policy.predict, condition, condition, null, 2.0, 1.0)(latents, times)
    torch.testing.assert_close(got, guided(policy.predict, condition, null, 3.0)(latents, times))


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("ddpo", {"kl_beta": -1.0}),
        ("ddpo", {"trained_share": 0.0}),
        ("prdp", {"beta": 0.0}),
        ("pref_grpo", {"duel_margin": -1.0}),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UserError):
        make(name, **changes)


@pytest.mark.parametrize("name", NAMES)
def test_methods_that_compare_the_images_of_a_caption_refuse_one_alone(name: str) -> None:
    with pytest.raises(UserError, match="images_per_prompt is 1: the images of a caption are compared"):
        make(name, images_per_prompt=1)
    DDPOConfig(images_per_prompt=1)  # what is expected of an image is known from other rollouts


def test_an_update_without_advantages_still_reports_its_rollout() -> None:
    policy = ToyPolicy()
    ctx = replace(context(policy), rewards={"flat": _Flat()})
    update = collected(make("ddpo"), ctx, captions(policy))[0]
    assert update.micro_batches[0].figures["flat_groups"] == 1.0
    assert update.micro_batches[0].figures["active_images"] == 0.0


class _Flat(Reward):
    """Likes everything."""

    info = RewardInfo("flat", "none", (1.0, 1.0), False)

    def score(self, images: Tensor, prompts: Any, metadata: Any = None) -> Tensor:
        return torch.ones(len(images))


def test_the_noise_of_a_flow_can_be_constant() -> None:
    process = ToyPolicy("flow").process
    growing, constant = (
        StochasticSteps(process, 4, noise_level=0.3, noise_schedule=kind) for kind in ("growing", "constant")
    )
    latents = torch.zeros(1, 3, 4, 4)
    for step in range(4):
        std = constant.transition(step, latents, latents).std
        torch.testing.assert_close(std.float(), 0.3 * constant.extent(step).sqrt())
    assert growing.transition(0, latents, latents).std > growing.transition(3, latents, latents).std


def test_images_can_be_drawn_between_two_captions() -> None:
    policy, settings = ToyPolicy(), {"num_steps": 3, "guidance_scale": 2.0}
    plain = generate(policy, ["a b"], [0], num_steps=3, guidance_scale=3.0)
    same = generate(policy, ["a b"], [0], **settings, expanded=["a b"], expanded_weight=1.0)  # type: ignore[arg-type]
    other = generate(policy, ["a b"], [0], **settings, expanded=["a b, long and detailed"])  # type: ignore[arg-type]
    torch.testing.assert_close(same, plain, atol=1.5 / 255, rtol=0)
    assert not other.equal(plain)
