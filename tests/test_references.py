"""References: what they compute, what they call themselves, and the cache."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.data.loader import ExampleLoader, LoaderOptions, MicroBatch, Position
from diffalign.policies.adapters import LoraSettings
from diffalign.policies.base import Policy
from diffalign.references import (
    AdaptersOff,
    CachedReference,
    FrozenCopy,
    NamedAdapter,
    Reference,
    _move_traffic,
    start_full,
    start_lora,
)
from diffalign.strategies.base import Context, Piece, Update
from diffalign.strategies.pair_kernel import DenoisingKernel
from diffalign.strategies.registry import get_method
from diffalign.training.update import GradientPass
from tests.factories import ToyPolicy, image_batch, tiny_policy
from tests.meeting import Meeting, meet


def errors(policy: Policy, batch: ImageBatch) -> Tensor:
    timesteps = policy.process.timestep_at(torch.tensor([100, 700]).repeat(2))
    return policy.predict(batch.latents, timesteps, batch.condition).square().flatten(1).mean(dim=1)[:, None]


def shake(policy: Policy, name: str = "default") -> None:
    with torch.no_grad():
        for parameter in policy.adapters.parameters(name):
            parameter += 0.3


def test_adapters_off_is_the_start() -> None:
    policy = ToyPolicy(adapter=False)
    batch = image_batch(policy)
    reference = start_lora(policy)
    start = errors(policy, batch)
    assert torch.equal(start, reference.evaluate(lambda p: errors(p, batch)))
    shake(policy)
    assert not torch.equal(start, errors(policy, batch))
    value = reference.evaluate(lambda p: errors(p, batch))
    assert torch.equal(start, value)
    assert not value.requires_grad


def test_adapters_off_refuses_a_training_network() -> None:
    policy = tiny_policy("sd")
    policy.train_weights()
    with pytest.raises(RuntimeError, match="FrozenCopy"):
        AdaptersOff(policy).evaluate(lambda p: torch.zeros(1, 1))


@pytest.mark.parametrize("kind", ["adapters_off", "named", "copy", "cached"])
def test_a_block_under_the_reference_sees_the_start_and_has_no_gradient(kind: str) -> None:
    policy = tiny_policy("sd")
    batch = image_batch(policy)
    if kind == "named":
        policy.adapters.add("start", LoraSettings(rank=3), trainable=False)
        shake(policy, "start")
    reference: Reference = start_full(policy) if kind == "copy" else start_lora(policy)
    start = errors(policy, batch).detach()
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter += 0.01 * parameter.requires_grad
    reference = CachedReference(reference) if kind == "cached" else reference
    with reference.active() as frozen:
        seen = errors(frozen, batch)
    assert torch.equal(seen, start)
    assert not seen.requires_grad
    moved = errors(policy, batch)
    assert moved.requires_grad
    assert not torch.equal(moved, start)


def test_exception_inside_leaves_adapters_on() -> None:
    policy = ToyPolicy()

    def fail(policy: Policy) -> Tensor:
        raise KeyError

    with pytest.raises(KeyError):
        AdaptersOff(policy).evaluate(fail)
    assert policy.adapters.active == "default"


def test_backward_inside_raises() -> None:
    policy = ToyPolicy()
    batch = image_batch(policy)
    loss = errors(policy, batch).sum()

    def train(policy: Policy) -> Tensor:
        loss.backward()
        return loss

    with pytest.raises(RuntimeError, match="switched off"):
        AdaptersOff(policy).evaluate(train)


def test_start_from_an_adapter_refers_to_it() -> None:
    policy = tiny_policy("sd")
    batch = image_batch(policy)
    policy.adapters.add("start", LoraSettings(rank=3, alpha=6), trainable=False)
    shake(policy, "start")
    start = errors(policy, batch).detach()
    reference = start_lora(policy, LoraSettings(rank=8, dropout=0.0))
    assert isinstance(reference, NamedAdapter)
    assert policy.adapters.settings("default").rank == 3
    assert policy.adapters.active == "default"
    assert torch.equal(errors(policy, batch), start)
    shake(policy)
    assert torch.equal(reference.evaluate(lambda p: errors(p, batch)), start)
    assert not any(p.requires_grad for p in policy.adapters.parameters("start"))


def test_frozen_copy_keeps_the_start_and_gets_no_gradient() -> None:
    policy = tiny_policy("sd")
    batch = image_batch(policy)
    reference = start_full(policy)
    start = errors(policy, batch)
    assert torch.equal(start, reference.evaluate(lambda p: errors(p, batch)))
    start.sum().backward()
    assert all(p.grad is not None for p in policy.module.parameters())
    with torch.no_grad():
        for parameter in policy.module.parameters():
            parameter += 0.01
    assert torch.equal(start, reference.evaluate(lambda p: errors(p, batch)))
    assert not any(p.requires_grad for p in reference._policy.module.parameters())


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copy_in_mixed_precision_takes_half_and_is_exact(family: str, dtype: torch.dtype) -> None:
    policy = tiny_policy(family)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():  # norms, too, get weights that half precision cannot hold
        for parameter in policy.module.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    batch = image_batch(policy)
    sized = policy.with_size(batch.conditions[0], {"original_size": (1001, 667)})
    batch = batch.with_conditions((sized, sized))
    reference = start_full(policy, mixed_precision=dtype)
    with torch.autocast("cpu", dtype=dtype), torch.no_grad():
        assert torch.equal(reference.evaluate(lambda p: errors(p, batch)), errors(policy, batch))
    held, whole = (sum(p.nbytes for p in network.parameters()) for network in (reference.network, policy.module))
    assert held < 0.55 * whole
    assert reference.identity == FrozenCopy(policy).identity


def test_copy_on_another_device_shares_the_empty_caption() -> None:
    policy = tiny_policy("sd")
    copy = FrozenCopy(policy, torch.device("meta"))._policy
    assert isinstance(copy, Policy)
    assert next(copy.module.parameters()).device.type == "meta"
    assert copy.device == policy.device
    null = copy.null_condition(2).tensors["prompt_embeds"]
    assert null.data_ptr() == policy.null_condition(2).tensors["prompt_embeds"].data_ptr()


def test_traffic_is_moved_both_ways() -> None:
    seen = []

    class Probe(torch.nn.Module):
        def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> tuple[Tensor, ...]:
            seen.extend([x.device.type, more["y"].device.type])
            return (torch.zeros(2),)

    probe = Probe()
    _move_traffic(probe, torch.device("meta"), torch.device("cpu"))
    (output,) = probe(torch.zeros(1), more={"y": torch.zeros(1)})
    assert seen == ["meta", "meta"]
    assert output.device.type == "cpu"


class TestIdentity:
    def test_of_the_base_ignores_adapters(self) -> None:
        first, second, other = tiny_policy("sd"), tiny_policy("sd", lora=True), tiny_policy("sd", seed=1)
        assert AdaptersOff(first).identity == AdaptersOff(second).identity != AdaptersOff(other).identity
        assert AdaptersOff(first).identity.startswith("base:")

    def test_of_an_adapter_follows_its_weights(self) -> None:
        policy = ToyPolicy()
        reference = NamedAdapter(policy, "default")
        before = reference.identity
        assert before.startswith("adapter:default:")
        shake(policy)
        assert reference.identity != before

    def test_of_a_copy_stands_still(self) -> None:
        policy = tiny_policy("sd")
        reference = start_full(policy)
        before = reference.identity
        assert before.startswith("copy:")
        assert start_full(tiny_policy("sd")).identity == before
        assert start_full(tiny_policy("sd", seed=1)).identity != before


class Counting(AdaptersOff):
    calls = 0

    def _held(self) -> AbstractContextManager[Any]:
        self.calls += 1
        return super()._held()


def epochs_in(world_size: int, epochs: int) -> list[tuple[list[int], dict[str, Tensor]]]:
    """Train on ten pairs in some processes; return of each its reference passes an epoch, and what it remembers."""
    names = [f"example-{index}" for index in range(10)]
    latents = torch.randn(len(names), 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))

    def batch(policy: Policy, micro: MicroBatch[Any]) -> ImageBatch:
        ids = [example.id for example in micro.examples]
        rows = latents[[names.index(name) for name in ids]].transpose(0, 1).flatten(0, 1)
        conditions = (policy.encode_prompts(ids),) * 2
        return ImageBatch(ids, micro.seeds, ids, cache_keys=micro.cache_keys, latents=rows, conditions=conditions)

    def train(processes: Meeting) -> tuple[list[int], dict[str, Tensor]]:
        policy, calls = ToyPolicy(), [0] * epochs
        inner = Counting(policy)
        ctx = Context(policy, CachedReference(inner, processes.exchange), reduce=processes.sum)
        method = get_method("diffusion_dpo")
        strategy = method.strategy(method.strategy.Config())
        step = GradientPass(strategy, ctx, list(policy.adapters.parameters("default")), processes)
        place = {"rank": processes.rank, "world_size": world_size}
        options = LoaderOptions(micro_batch=2, accumulation=3 // world_size, pinned_draws=1, **place)
        loader = ExampleLoader([SimpleNamespace(id=name) for name in names], options)
        for micro_batches in loader:
            step(Update([batch(policy, micro) for micro in micro_batches]))
            epoch = loader.position.epoch
            calls[epoch] = inner.calls - sum(calls[:epoch])
            if loader.position == Position(epochs - 1, loader.steps_per_epoch or 0):
                break
        assert ctx.reference is not None
        state = ctx.reference.state_dict()
        return calls, dict(zip(state["keys"], state["values"], strict=True))

    return meet(world_size, train)


class TestCache:
    def test_answers_by_row_and_computes_once(self) -> None:
        policy = ToyPolicy()
        batch = image_batch(policy)
        inner = Counting(policy)
        cache = CachedReference(inner)
        keys = ["a/0", "b/0", "a/1", "b/1"]
        first = cache.evaluate(lambda p: errors(p, batch), keys)
        again = cache.evaluate(lambda p: errors(p, batch), keys[::-1])
        assert inner.calls == 1
        assert torch.equal(again, first.flip(0))
        cache.evaluate(lambda p: errors(p, batch))
        cache.evaluate(lambda p: errors(p, batch), ["a/0", "b/0", "a/1", "new"])
        assert inner.calls == 3
        assert cache.identity == inner.identity

    def test_kernel_uses_keys(self) -> None:
        policy = ToyPolicy()
        batch = replace(image_batch(policy), cache_keys=["x#0", "y#0"])
        inner = Counting(policy)
        ctx = Context(policy, CachedReference(inner))
        kernel = DenoisingKernel()
        draws = kernel.draw(ctx, batch)
        first = kernel.frozen(ctx, batch, draws, Piece())["reference"]
        parts = [kernel.frozen(ctx, batch, draws, Piece(rows=rows))["reference"] for rows in (slice(0, 3), slice(3, 4))]
        assert inner.calls == 1
        assert torch.equal(torch.cat(parts), first)

    @pytest.mark.parametrize("world_size", [1, 3])
    def test_every_process_knows_the_values_of_all_from_the_second_epoch_on(self, world_size: int) -> None:
        """Examples go to other processes in each epoch; a checkpoint holds what the main process knows."""
        counted = epochs_in(world_size, epochs=3)
        first = counted[0][1]
        for (of_first, *later), known in counted:
            assert of_first > 0
            assert later == [0, 0]
            assert sorted(known) == sorted(first)
            assert all(torch.equal(known[key], value) for key, value in first.items())
        assert len(first) == 20
