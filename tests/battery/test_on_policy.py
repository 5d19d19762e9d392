"""The same questions to every on-policy method that is registered."""

from __future__ import annotations

import math
from dataclasses import replace
from threading import Barrier, Thread

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffalign.rollouts.transitions import TransitionBatch
from diffalign.strategies.base import Terms, Update
from diffalign.strategies.metrics import GLOSSARY
from diffalign.strategies.registry import list_methods
from tests.battery.methods import PROCESSES, CountingPolicy
from tests.battery.on_policy import (
    NAMES,
    brightness,
    captions,
    collected,
    context,
    described,
    gradient,
    make,
    trained_reward,
)
from tests.factories import ToyPolicy, tiny_sd, tiny_sd3

MOVED = (0.02, -0.03)
every_method = pytest.mark.parametrize("name", NAMES)
every_process = pytest.mark.parametrize("process", PROCESSES)


def first_update(name: str, policy: CountingPolicy, **options: object) -> tuple:
    strategy, ctx = make(name, **options), context(policy)
    return strategy, ctx, collected(strategy, ctx, captions(policy))[0]


@every_method
def test_images_of_a_rollout_are_counted(name: str) -> None:
    policy = CountingPolicy()
    strategy, ctx, _ = first_update(name, policy)
    assert ctx.progress.images == 3 * strategy.config.images_per_prompt


@every_method
@pytest.mark.parametrize(("sampled_at_once", "size"), [(100, 1000), (4, 1000), (100, 3)])
def test_number_of_denoiser_calls(name: str, sampled_at_once: int, size: int) -> None:
    """Sampling asks once a step and batch of images; an update once a pass, whatever guidance does inside one."""
    policy, expectation = CountingPolicy(delta=MOVED), described(name)
    options = {"rollout_batch_size": sampled_at_once, "transitions_per_pass": size}
    strategy, ctx, update = first_update(name, policy, **options)
    assert policy.calls == {"policy": 4 * (1 if sampled_at_once == 100 else 3)}
    policy.calls.clear()
    gradient(strategy, ctx, update, [policy.trained])
    rows = [len(batch.transitions.steps) for batch in update.micro_batches]
    per_pass = size // 2 * 2 if expectation.pairs else size
    passes = sum(math.ceil(count / per_pass) for count in rows)
    expected = {"trained": passes}
    expected |= {"reference": passes} if expectation.reference else {}
    expected |= {"policy": passes} if expectation.coupled and max(rows) > size else {}
    assert policy.calls == expected


@every_process
@every_method
def test_what_is_replayed_is_what_was_sampled(name: str, process: str) -> None:
    policy = CountingPolicy(process, MOVED)
    strategy, ctx, update = first_update(name, policy)
    account = gradient(strategy, ctx, update, [policy.trained])
    if "relative_loss" in account.sums:
        assert account.sums["relative_loss"].item() == pytest.approx(account.examples, rel=0.05)
    if "ratio" in account.sums:
        assert account.sums["ratio"].item() == pytest.approx(account.examples, rel=1e-4)
        assert account.sums["clipped_share"] == 0
    assert policy.trained.grad is not None
    assert policy.trained.grad.isfinite().all()
    assert policy.trained.grad.abs().max() > 0


def doubled(batch: TransitionBatch) -> TransitionBatch:
    """The same batch in double precision."""
    assert batch.transitions is not None
    rows = batch.transitions
    kept = replace(rows.trajectories, latents=rows.trajectories.latents.double())
    return replace(batch, transitions=replace(rows, trajectories=kept))


@every_process
@every_method
def test_gradients_agree_with_finite_differences(name: str, process: str) -> None:
    policy = CountingPolicy(process, MOVED, double=True)
    strategy, ctx, update = first_update(name, policy)
    update = replace(update, micro_batches=[doubled(batch) for batch in update.micro_batches])
    policy.trained.data += 1e-3  # off the point where both sides of a clamp or a maximum are equal
    gradient(strategy, ctx, update, [policy.trained])
    assert policy.trained.grad is not None
    exact, start = policy.trained.grad.clone(), policy.trained.detach().clone()
    numeric = torch.zeros(2, dtype=torch.float64)
    for index in range(2):
        for sign in (1, -1):
            policy.trained.data.copy_(start)
            policy.trained.data[index] += sign * 1e-5
            account = gradient(strategy, ctx, update, [policy.trained])
            losses = sum(loss * len(ids) for ids, loss, _ in account.micro_batches)
            numeric[index] += sign * float(losses) / account.weight / 2e-5
    assert_close(exact, numeric, rtol=1e-3, atol=1e-6)


@every_method
def test_size_of_passes_changes_nothing(name: str) -> None:
    policy, results = CountingPolicy(delta=MOVED), []
    for size in (1, 5, 1000):
        strategy, ctx, update = first_update(name, policy, transitions_per_pass=size)
        policy.trained_rows = 0
        gradient(strategy, ctx, update, [policy.trained])
        assert policy.trained.grad is not None
        results.append(policy.trained.grad.clone())
        assert policy.trained_rows <= 2 * size * (2 if described(name).pairs else 1)  # guidance doubles the rows
    assert_close(results[1], results[0], rtol=1e-4, atol=1e-7)
    assert_close(results[2], results[0], rtol=1e-4, atol=1e-7)


def contents(updates: list[Update]) -> dict[tuple[int, str], list[float]]:
    """Every example of some updates with its numbers."""
    found = {}
    for index, update in enumerate(updates):
        for batch in update.micro_batches:
            for row, name in enumerate(batch.ids):
                found[index, name] = [v[row].flatten().tolist() for _, v in sorted(batch.fields.items())]
    return found


@every_method
def test_two_processes_train_on_what_one_does(name: str) -> None:
    """Three captions on two processes: one process has two groups, the other one; a fourth rank would have none."""
    policy = ToyPolicy()
    whole = collected(make(name), context(policy), captions(policy))
    boxes: list[Tensor | None] = [None] * 3
    barrier = Barrier(3, timeout=60)
    results: dict[int, list[Update]] = {}

    def process(rank: int) -> None:
        def reduce(value: Tensor) -> Tensor:
            boxes[rank] = value
            barrier.wait()
            total = sum(box for box in boxes if box is not None)
            barrier.wait()
            assert isinstance(total, Tensor)
            return total

        own = ToyPolicy()
        batches = [captions(own)[0:1], captions(own)[1:2], []][rank]
        ctx = context(own, rank=rank, world_size=3, reduce=reduce)
        results[rank] = collected(make(name), ctx, batches)

    threads = [Thread(target=process, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results[0]) == len(results[1]) == len(results[2]) == len(whole)
    split = {key: value for rank in range(3) for key, value in contents(results[rank]).items()}
    assert split == contents(whole)
    for index, update in enumerate(whole):
        assert update.weight == sum(results[rank][index].weight or 0 for rank in range(3))


@every_method
def test_metrics_are_detached_and_documented(name: str) -> None:
    policy = CountingPolicy(delta=MOVED)
    strategy, ctx, update = first_update(name, policy)
    batch = update.micro_batches[0]
    assert isinstance(batch, TransitionBatch)
    draws = strategy.draw(ctx, batch)
    frozen = [strategy.frozen(ctx, batch, draws, piece) for piece in strategy.pieces(ctx, batch, draws)]
    parts = [strategy.terms(ctx, batch, draws, piece) for piece in strategy.pieces(ctx, batch, draws)]
    terms = Terms.join([Terms(p, f) for p, f in zip(parts, frozen, strict=True)], 0)
    output = strategy.loss(terms, {}, batch)
    explained = {**GLOSSARY, **strategy.glossary}
    assert {metric for metric in output.metrics if not metric.startswith("reward/")} <= explained.keys()
    assert {"reward", "reward_std", "flat_groups", "loss"} <= output.metrics.keys()
    for value in output.metrics.values():
        assert not value.requires_grad
        assert value.shape in {(), (batch.size,)}
    assert_close(output.metrics["loss"].mean(), output.loss.detach(), rtol=1e-5, atol=1e-6)


def test_what_one_method_reports_is_explained_there_and_what_several_do_once() -> None:
    own = [set(method.strategy.glossary) for method in list_methods()]
    assert {"front_share", "relative_loss", "anchor_sign", "warm_start"} <= set.union(*own)
    assert sum(map(len, own)) == len(set.union(*own))
    assert not set.union(*own) & GLOSSARY.keys()


@every_method
def test_state_survives_a_round_trip_and_foreign_state_is_refused(name: str) -> None:
    policy = ToyPolicy()
    strategy, other = make(name), make(name)
    collected(strategy, context(policy), captions(policy))
    other.build(context(policy))
    other.load_state_dict(strategy.state_dict())
    assert other.state_dict() == strategy.state_dict()
    with pytest.raises(ValueError, match="checkpoint"):
        other.load_state_dict({"of_another_method": 1})


@every_process
@every_method
def test_a_few_rollouts_raise_the_reward(name: str, process: str) -> None:
    learning = described(name)
    start, trained = (
        trained_reward(make(name, **learning.to_learn), ToyPolicy(process), n, learning.learning_rate, brightness)
        for n in (0, 6)
    )
    assert trained > start + 0.002


@every_process
@every_method
def test_on_real_networks(name: str, process: str) -> None:
    policy = tiny_sd3(lora=True) if process == "flow" else tiny_sd(process, lora=True)  # type: ignore[arg-type]
    strategy, ctx = make(name, images_per_prompt=2, rollout_steps=2), context(policy)
    update = collected(strategy, ctx, captions(policy, 2))[0]
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    account = gradient(strategy, ctx, update, parameters)
    assert all(value.isfinite().all() for value in account.sums.values())
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
