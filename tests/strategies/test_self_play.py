"""SePPO and Diffusion-DRO: which weights sample, which weights judge, and when they change."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffalign.diffusion.guidance import guided
from diffalign.diffusion.random import randn_rows
from diffalign.diffusion.sampling import follow, sample
from diffalign.errors import UserError
from diffalign.policies.pool import AdapterPool
from diffalign.strategies.base import Context, Piece
from diffalign.strategies.dro import DRO, DROConfig, own_trajectory
from diffalign.strategies.pair_loss import PairErrors
from diffalign.strategies.seppo import SePPO, SePPOConfig, anchored_margin
from diffalign.strategies.sft import SFT, SFTConfig
from diffalign.training.processes import Processes
from diffalign.training.update import GradientPass
from tests.factories import ToyPolicy, image_batch
from tests.strategies.support import context, moved_policy, step

PROCESSES = ["epsilon", "v_prediction", "flow"]
SHAPE = (3, 4, 4)


def move(policy: ToyPolicy, *delta: float) -> None:
    policy.module.delta["default"].data.copy_(torch.tensor(delta))


def seppo(policy: ToyPolicy, **options: object) -> tuple[SePPO, Context]:
    strategy = SePPO(SePPOConfig(**{"rollout_steps": 3, "checkpoint_steps": 2, **options}))  # type: ignore[arg-type]
    ctx = context(policy, with_reference=False)
    strategy.build(ctx)
    return strategy, ctx


def test_seppo_holds_back_only_what_counts_as_a_loser() -> None:
    sign, values = torch.tensor([1.0, -1.0]), torch.full((4,), 0.1, dtype=torch.float64).requires_grad_()
    errors = PairErrors(*values.chunk(2), *torch.full((2, 2), 0.2, dtype=torch.float64))
    anchored_margin(errors, sign, 0.25).sum().backward()
    assert values.grad is not None
    assert_close(values.grad, torch.tensor([-1.0, -1.0, 0.25, -1.0], dtype=torch.float64))


def past(policy: ToyPolicy) -> list[float]:
    return policy.module.delta["past"].tolist()


@pytest.mark.parametrize("process", PROCESSES)
def test_seppo_starts_at_log_two_and_ignores_its_own_images(process: str) -> None:
    policy = ToyPolicy(process)
    strategy, ctx = seppo(policy)
    values, output = step(strategy, ctx, image_batch(policy, examples=3, images=1))
    assert values.policy.shape == (6, 1)
    assert torch.equal(values.policy, values.reference)
    assert output.metrics["anchor_sign"].tolist() == [0.0] * 3
    assert output.loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_the_checkpoint_that_samples_is_the_reference() -> None:
    policy = moved_policy(delta=(0.1, -0.2))
    strategy, ctx = seppo(policy, rollout_guidance_scale=2.0)
    move(policy, 0.3, 0.3)
    batch = image_batch(policy, examples=3, images=1)
    draws = strategy.draw(ctx, batch)

    old = moved_policy(delta=(0.1, -0.2))
    predict = guided(old.predict, batch.condition, old.null_condition(3), 2.0)
    with old.inference():
        images = sample(predict, old.process, randn_rows(batch.seeds, SHAPE, "own-image", ctx.device), 3)
    pairs = replace(batch, latents=torch.cat([batch.latents, images]), conditions=batch.conditions * 2)
    expected = strategy._kernel.draw(ctx, pairs)
    assert_close(draws.latents, expected.latents)
    assert_close(draws.target, expected.target)
    errors = strategy.frozen(ctx, batch, draws, Piece())["reference"]
    assert_close(errors, strategy._kernel.terms(Context(old), batch, draws, Piece()).detach())
    assert policy.adapters.active == "default"


def test_a_stage_ends_with_a_checkpoint() -> None:
    policy = ToyPolicy()
    for draw, expected in (("latest", [0.0, 0.0, 2.0, 2.0, 4.0]), ("initial", [0.0] * 5)):
        move(policy, 0.0, 0.0)
        strategy, ctx = seppo(policy, reference_draw=draw)
        seen = []
        for done in range(5):
            ctx.progress.step = done
            move(policy, float(done), 0.0)
            strategy.collect(ctx, [])
            seen.append(past(policy)[0])
        assert seen == expected
        assert len(strategy.pool) == 3


def test_every_checkpoint_is_drawn_alike_and_the_same_again() -> None:
    strategy, _ = seppo(ToyPolicy())
    counts = Counter(strategy._drawn(seed, 8) for seed in range(2000))
    assert sorted(counts) == [0, 1, 2, 3, 4]
    assert all(330 < count < 470 for count in counts.values())
    drawn = [strategy._drawn(7, step) for step in range(40)]
    assert drawn == [strategy._drawn(7, step) for step in range(40)]
    assert drawn[::2] == drawn[1::2]  # a stage has two steps
    anew, _ = seppo(ToyPolicy(), reference_redrawn="update")
    drawn = [anew._drawn(7, step) for step in range(40)]
    assert drawn[::2] != drawn[1::2]
    assert all(index <= step // 2 for step, index in enumerate(drawn))


def test_the_pool_survives_a_checkpoint_and_forgets_the_oldest() -> None:
    policy, pool = ToyPolicy(), AdapterPool(size=2)
    pool.build(policy.adapters)
    for value in (1.0, 2.0):
        move(policy, value, -value)
        pool.add()
    assert len(pool) == 2
    elsewhere, other = ToyPolicy(), AdapterPool(size=2)
    other.build(elsewhere.adapters)
    other.load_state_dict(pool.state_dict())
    for index, value in enumerate((1.0, 2.0)):
        pool.load(index)
        other.load(index)
        assert past(policy) == past(elsewhere) == [value, -value]
    with pytest.raises(UserError, match="checkpoint holds"):
        pool.load_state_dict({"running": 1})


def test_without_adapters_there_is_no_past() -> None:
    with pytest.raises(UserError, match="--train_mode lora"):
        seppo(ToyPolicy(adapter=False))
    DRO(DROConfig()).build(context(ToyPolicy(adapter=False)))  # its sampler is the policy itself
    with pytest.raises(UserError, match="--train_mode lora"):
        DRO(DROConfig(sampler_steps=2)).build(context(ToyPolicy(adapter=False)))


@pytest.mark.parametrize("make", [SePPOConfig, DROConfig])
def test_steps_are_counted_from_one(make: type) -> None:
    with pytest.raises(UserError, match="rollout_steps is 0"):
        make(rollout_steps=0)


def walk(policy: ToyPolicy, seeds: Tensor, num_steps: int = 5):  # type: ignore[no-untyped-def]
    condition = policy.encode_prompts([f"a {seed}" for seed in seeds.tolist()])
    with policy.inference():
        return own_trajectory(Context(policy), condition, seeds, SHAPE, num_steps), condition


@pytest.mark.parametrize("process", PROCESSES)
def test_a_trajectory_is_what_the_sampler_does(process: str) -> None:
    policy, seeds = moved_policy(process), torch.arange(12)
    met, condition = walk(policy, seeds)
    assert_close(met.target, policy.predict(met.latents, met.timesteps, condition).detach())
    grid = torch.arange(4, -1, -1) * 200  # before the shift of each row
    for row in range(len(seeds)):
        shifts = [met.timesteps[row] == policy.process.timestep_at(grid + offset) for offset in range(200)]
        (offset,) = [index for index, hit in enumerate(shifts) if hit.any()]
        timesteps = policy.process.timestep_at(grid + offset)
        one = condition.select(slice(row, row + 1))
        visited = [randn_rows(seeds[row : row + 1], SHAPE, "trajectory-start", torch.device("cpu"))]
        with policy.inference():
            follow(
                guided(policy.predict, one),
                policy.process,
                visited[0],
                policy.process.grid_through(timesteps),
                callback=lambda _, latents, visited=visited: visited.append(latents),
            )
        at = int(shifts[offset].nonzero()[0])
        assert_close(met.latents[row : row + 1], visited[at].float(), rtol=1e-4, atol=1e-5)


def test_trajectories_visit_all_timesteps_and_belong_to_their_seeds() -> None:
    policy, seeds = ToyPolicy(), torch.arange(400)
    met, _ = walk(policy, seeds, num_steps=20)
    assert met.timesteps.min() < 50
    assert met.timesteps.max() >= 950
    assert len(set((met.timesteps // 50).tolist())) == 20
    assert len(set((met.timesteps % 50).tolist())) > 45
    few, _ = walk(policy, seeds[7:9], num_steps=20)
    assert torch.equal(few.timesteps, met.timesteps[7:9])
    assert_close(few.latents, met.latents[7:9])


@pytest.mark.parametrize("process", PROCESSES)
def test_a_fresh_sampler_costs_nothing_and_an_old_one_pushes(process: str) -> None:
    policy = moved_policy(process)
    ctx, batch = context(policy), image_batch(policy, examples=4, images=1)
    strategy = DRO(DROConfig(rollout_steps=3, sampler_steps=2))
    strategy.build(ctx)
    strategy.collect(ctx, [batch])
    _, output = step(strategy, ctx, batch)
    assert output.metrics["policy_error_rejected"].max() < 1e-10
    move(policy, 0.2, 0.2)
    for done, stale in ((1, True), (2, False), (3, False)):
        ctx.progress.step = done
        strategy.collect(ctx, [batch])
        _, output = step(strategy, ctx, batch)
        assert (output.metrics["policy_error_rejected"].min() > 1e-6) == stale


def test_at_the_start_the_hinge_is_its_margin() -> None:
    policy = ToyPolicy()
    _, output = step(DRO(DROConfig(rollout_steps=3)), context(policy), image_batch(policy, examples=4, images=1))
    assert output.loss.item() == pytest.approx(0.001)
    assert output.metrics["active_share"].tolist() == [1.0] * 4


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(
    "make",
    [
        lambda: SePPO(SePPOConfig(beta=100.0, rollout_steps=3, checkpoint_steps=10)),
        lambda: DRO(DROConfig(rollout_steps=3)),
        lambda: DRO(DROConfig(rollout_steps=3, sampler_steps=10)),
    ],
)
def test_winners_are_denoised_better_after_some_stages(make, process: str) -> None:  # type: ignore[no-untyped-def]
    policy, strategy = ToyPolicy(process, weight=(0.7, 1.5)), make()  # makes too much of the caption
    ctx = context(policy)
    strategy.build(ctx)
    judge, unseen = SFT(SFTConfig()), image_batch(policy, examples=64, images=1, seed=1000)
    with torch.no_grad():
        before = step(judge, ctx, unseen)[1].loss.item()
    trained = policy.adapters.parameters()
    optimizer = torch.optim.Adam(trained, lr=0.02)
    for done in range(40):
        ctx.progress.step = done
        (update,) = strategy.collect(ctx, [image_batch(policy, examples=16, images=1, seed=done)])
        optimizer.zero_grad()
        GradientPass(strategy, ctx, trained, Processes())(update)
        optimizer.step()
    with torch.no_grad():
        after = step(judge, ctx, unseen)[1].loss.item()
    assert after < 0.99 * before
