"""Order of examples: every one once an epoch, the same for any number of processes, resumable anywhere."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.data.loader import ExampleLoader, LoaderOptions, MicroBatch
from diffalign.data.prefetch import mapped, prefetched
from diffalign.errors import UserError


@dataclass(frozen=True)
class Item:
    id: str
    group: Any = None


def items(count: int, groups: int = 1) -> list[Item]:
    return [Item(f"e{i}", i % groups) for i in range(count)]


class Stream:
    def __init__(self, examples: list[Item]) -> None:
        self.examples = examples

    def open(self) -> Iterator[Item]:
        return iter(self.examples)


def take(loader: ExampleLoader, steps: int) -> list[list[MicroBatch]]:
    return list(itertools.islice(loader, steps))


def ids(micro_batches: list[MicroBatch]) -> list[str]:
    return [example.id for micro in micro_batches for example in micro.examples]


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 40),
    groups=st.integers(1, 3),
    micro=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    world_size=st.integers(1, 4),
    streamed=st.booleans(),
    seed=st.integers(0, 5),
)
def test_every_example_is_seen_once_an_epoch(count, groups, micro, accumulation, world_size, streamed, seed):
    data = items(count, groups)
    seen: list[str] = []
    steps = None
    for rank in range(world_size):
        options = LoaderOptions(seed, micro, accumulation, rank, world_size, shuffle_buffer=7)
        loader = ExampleLoader(Stream(data) if streamed else data, options)
        epoch = list(itertools.takewhile(lambda _, at=loader: at.position.epoch == 0, loader))
        assert steps in (None, len(epoch))
        steps = len(epoch)
        assert streamed or steps == loader.steps_per_epoch
        for micro_batches in epoch:
            assert all(len(m.examples) <= micro for m in micro_batches)
            assert len(micro_batches) <= accumulation
            assert len({example.group for m in micro_batches for example in m.examples}) <= 1
            seen += ids(micro_batches)
    assert sorted(seen) == sorted(example.id for example in data)


@pytest.mark.parametrize("streamed", [False, True])
def test_world_size_changes_who_sees_an_example_but_not_its_step_or_seed(streamed):
    data = items(23)

    def steps(world_size: int, micro: int, accumulation: int) -> list[dict[str, int]]:
        merged: list[dict[str, int]] = [{} for _ in range(7)]
        for rank in range(world_size):
            options = LoaderOptions(3, micro, accumulation, rank, world_size)
            loader = ExampleLoader(Stream(data) if streamed else data, options)
            for step, micro_batches in zip(merged, take(loader, len(merged)), strict=True):
                for m in micro_batches:
                    step.update({e.id: s for e, s in zip(m.examples, m.seeds.tolist(), strict=True)})
        return merged

    assert steps(1, 8, 1) == steps(2, 2, 2) == steps(4, 1, 2) == steps(8, 1, 1)


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("prefetch", [0, 3])
def test_resuming_continues_where_the_saved_position_stands(streamed, prefetch):
    data = items(11, groups=2)
    options = LoaderOptions(seed=5, micro_batch=2, prefetch=prefetch)

    def fresh() -> ExampleLoader:
        return ExampleLoader(Stream(data) if streamed else data, options)

    whole = take(fresh(), 15)
    for interrupted_after in (0, 1, 5, 6, 12):
        first, second = fresh(), fresh()
        done = take(first, interrupted_after)
        second.load_state_dict(first.state_dict())
        rest = take(second, 15 - interrupted_after)
        assert [ids(step) for step in done + rest] == [ids(step) for step in whole]
        assert all(
            torch.equal(a.seeds, b.seeds)
            for mine, theirs in zip(done + rest, whole, strict=True)
            for a, b in zip(mine, theirs, strict=True)
        )


def test_order_and_seeds_differ_between_epochs_and_between_seeds():
    data = items(20)
    options = LoaderOptions(seed=0, micro_batch=20)
    first, second = take(ExampleLoader(data, options), 2)
    (other,) = take(ExampleLoader(data, LoaderOptions(seed=1, micro_batch=20)), 1)
    assert len({tuple(ids(step)) for step in (first, second, other)}) == 3
    assert not set(first[0].seeds.tolist()) & set(second[0].seeds.tolist())


def test_pinned_draws_repeat_seeds_and_name_the_visits():
    loader = ExampleLoader(items(4), LoaderOptions(seed=0, micro_batch=4, pinned_draws=2))
    epochs = [dict(zip(m.cache_keys, m.seeds.tolist(), strict=True)) for (m,) in take(loader, 4)]
    assert epochs[0] == epochs[2]
    assert epochs[1] == epochs[3]
    assert not set(epochs[0].values()) & set(epochs[1].values())
    assert set(epochs[0]) == {"e0#0", "e1#0", "e2#0", "e3#0"}
    assert take(ExampleLoader(items(4), LoaderOptions()), 1)[0][0].cache_keys is None


def test_a_process_without_examples_still_gets_its_step():
    loader = ExampleLoader(items(3), LoaderOptions(rank=1, world_size=2, shuffle=False))
    assert [ids(step) for step in take(loader, 3)] == [["e1"], [], ["e1"]]


def test_processes_in_lockstep_run_micro_batches_of_the_same_size():
    """A step of eight, then one of three that two processes cannot share evenly; every example is still seen once."""
    options = {"micro_batch": 2, "accumulation": 2, "world_size": 2, "lockstep": True}
    both = [take(ExampleLoader(items(11), LoaderOptions(rank=rank, **options)), 2) for rank in range(2)]
    sizes = [[[len(micro.examples) for micro in step] for step in steps] for steps in both]
    assert sizes == [[[2, 2], [1, 1]], [[2, 2], [1]]]
    assert len({name for steps in both for step in steps for name in ids(step)}) == 11


def test_prepare_runs_on_each_micro_batch_in_a_thread_of_its_own():
    threads: set[str] = set()

    def prepare(micro: MicroBatch) -> MicroBatch:
        threads.add(threading.current_thread().name)
        return replace(micro, prepared="+".join(example.id for example in micro.examples))

    loader = ExampleLoader(items(4), LoaderOptions(micro_batch=2, prefetch=2, shuffle=False), prepare)
    assert [[m.prepared for m in step] for step in take(loader, 2)] == [["e0+e1"], ["e2+e3"]]
    assert threads == {"diffalign-prefetch"}


@pytest.mark.parametrize("prefetch", [0, 2])
def test_of_a_large_step_few_micro_batches_wait_at_a_time(prefetch):
    """Prepared images are large: a step of twenty micro-batches must not hold those of all."""
    prepared, used, most = 0, 0, 0

    def prepare(micro: MicroBatch) -> MicroBatch:
        nonlocal prepared
        prepared += 1
        return micro

    def use(micro: MicroBatch) -> str:
        nonlocal used, most
        most = max(most, prepared - used)
        used += 1
        return micro.examples[0].id

    loader = ExampleLoader(items(20), LoaderOptions(accumulation=20, prefetch=prefetch, shuffle=False), prepare)
    (step,) = itertools.islice(loader.steps(use), 1)
    assert step == [f"e{index}" for index in range(20)]
    assert most <= prefetch + 2  # those in the queue, one in the making, one in use


@pytest.mark.parametrize("groups", [1, 2])
def test_the_first_examples_are_those_that_the_first_steps_hand_out(groups):
    loader = ExampleLoader(items(23, groups=groups), LoaderOptions(seed=4, micro_batch=4))
    for steps in (1, 3):
        handed_out = {name for step in take(ExampleLoader(items(23, groups=groups), loader.options), steps)
                      for name in ids(step)}  # fmt: skip
        assert {example.id for example in loader.first_examples(steps)} == handed_out
        assert len(handed_out) < 23
    assert loader.first_examples(loader.steps_per_epoch) == list(items(23, groups=groups))


def test_an_error_in_the_background_arrives_at_the_consumer_in_its_place():
    def numbers() -> Iterator[int]:
        yield 1
        raise UserError("bad image")

    stream = prefetched(numbers(), depth=4)
    assert next(stream) == 1
    with pytest.raises(UserError, match="bad image"):
        next(stream)


def test_leaving_the_loop_ends_the_thread():
    before = threading.active_count()
    stream = prefetched(itertools.count(), depth=1)
    assert next(stream) == 0
    stream.close()
    assert threading.active_count() == before


def test_results_of_threads_come_in_order_and_are_not_made_far_ahead():
    taken: list[int] = []

    def numbers() -> Iterator[int]:
        for number in itertools.count():
            taken.append(number)
            yield number

    def inverse(number: int) -> float:
        return 1 / (5 - number)

    results = mapped(inverse, numbers(), ahead=3)
    assert [next(results) for _ in range(5)] == [1 / 5, 1 / 4, 1 / 3, 1 / 2, 1]
    assert len(taken) <= 5 + 3
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_examples_that_cannot_be_used_leave_the_step_to_the_others():
    def prepare(micro: MicroBatch) -> MicroBatch:
        return micro.select([row for row, example in enumerate(micro.examples) if example.id != "e1"])

    options = LoaderOptions(micro_batch=1, accumulation=2, shuffle=False, pinned_draws=1)
    first, second = take(ExampleLoader(Stream(items(4)), options, prepare), 2)
    assert [ids(step) for step in (first, second)] == [["e0"], ["e2", "e3"]]
    assert second[0].cache_keys == ("e2#0",)


@pytest.mark.parametrize("data", [[], Stream([])])
def test_empty_data_is_refused(data):
    with pytest.raises(UserError, match="empty"):
        take(ExampleLoader(data, LoaderOptions()), 1)


def test_repeated_ids_are_refused():
    with pytest.raises(UserError, match="two examples have the id 'e0'"):
        ExampleLoader([Item("e0"), Item("e1"), Item("e0")], LoaderOptions())


@pytest.mark.parametrize(
    ("data", "options", "what"),
    [
        (items(9), LoaderOptions(seed=1), "seed"),
        (items(9), LoaderOptions(micro_batch=2), "global batch"),
        (items(8), LoaderOptions(), "number of examples"),
    ],
)
def test_resuming_under_another_order_is_refused(data, options, what):
    state = ExampleLoader(items(9), LoaderOptions()).state_dict()
    with pytest.raises(UserError, match=what):
        ExampleLoader(data, options).load_state_dict(state)
