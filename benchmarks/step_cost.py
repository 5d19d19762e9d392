"""What one LoRA Diffusion-DPO step costs through our loop, beside the bare model and the naive recipe, in one run.

    python benchmarks/step_cost.py [--model tiny-sd] [--pairs 4] [--repeats 5] [--out benchmarks/results/step_cost.json]

Four variants of the same step (same pairs, noise and timesteps):

- ``bare``: the PEFT model called by hand: one concatenated pass with a graph, backward, one pass with adapters off;
- ``loop``: our loop's update; ``cached``: the same with reference errors remembered;
- ``naive``: as research scripts do: a second full model as the reference, separate passes for the two images, latents
  and caption encoded anew in every step.

FLOPs are counted by torch and exact; times are medians, and only their ratios within one run mean anything; bytes are
those of tensors saved for backward.
"""

from __future__ import annotations

import copy
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from diffalign.batch import ImageBatch
from diffalign.diffusion.random import randn_rows
from diffalign.policies.adapters import LoraSettings
from diffalign.policies.base import Policy
from diffalign.policies.loading import load_policy
from diffalign.references import AdaptersOff, CachedReference
from diffalign.strategies.base import Context, Piece, Terms, Update
from diffalign.strategies.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from diffalign.strategies.pair_kernel import squared_errors
from diffalign.training.processes import Processes
from diffalign.training.update import GradientPass

Step = Callable[[], Any]


@dataclass(frozen=True)
class Cost:
    """What a variant of the step costs.

    Args:
        flops: floating-point operations of forward and backward.
        saved_bytes: bytes of tensors kept for backward, each storage once, weights not counted.
        seconds: median time.
    """

    flops: int
    saved_bytes: int
    seconds: float = 0.0


def measure(step: Step, policy: Policy, repeats: int = 0) -> Cost:
    """Count a step's FLOPs and saved bytes; time it if ``repeats`` is not 0."""
    weights = {p.untyped_storage().data_ptr() for p in policy.module.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    with FlopCounterMode(display=False) as counter:
        step()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return Cost(counter.get_total_flops(), sum(saved.values()), statistics.median(times) if times else 0.0)


def prepare(policy: Policy, pairs: int, rank: int) -> tuple[ImageBatch, Tensor]:
    """Add a LoRA adapter and make a batch of random pairs; returns it with the pictures it was encoded from."""
    policy.adapters.add("default", LoraSettings(rank=rank))
    height, width = policy.default_resolution
    seeds = torch.arange(pairs)
    pixels = (
        randn_rows(seeds, (2, 3, height, width), "pixels", policy.device).transpose(0, 1).flatten(0, 1).clamp(-1, 1)
    )
    captions = [f"picture {i}" for i in range(pairs)]
    condition = policy.with_size(
        policy.encode_prompts(captions), {"original_size": torch.tensor([[height, width]] * pairs)}
    )
    with torch.no_grad():
        latents = policy.encode_images(pixels)
    names = [f"pair-{i}" for i in range(pairs)]
    batch = ImageBatch(names, seeds, captions, latents=latents, conditions=(condition, condition))
    return batch, pixels


def variants(policy: Policy, batch: ImageBatch, pixels: Tensor) -> dict[str, Step]:
    """Return the four steps; each leaves gradients in the adapters and clears them first."""
    trained = [p for p in policy.module.parameters() if p.requires_grad]
    strategy = DiffusionDPO(DiffusionDPOConfig())
    reference = AdaptersOff(policy)
    noised = strategy.draw(Context(policy, reference), batch)
    kernel = strategy.kernel()
    naive_reference = policy.with_module(copy.deepcopy(policy.module).requires_grad_(False))

    def clear() -> None:
        for parameter in trained:
            parameter.grad = None

    def errors(model: Policy, rows: slice | None = None) -> Tensor:
        part = noised.select(rows)
        return squared_errors(model.predict(part.latents, part.timesteps, part.condition), part.target)[:, None]

    def finish(policy_errors: Tensor, reference_errors: Tensor) -> None:
        strategy.loss(Terms(policy_errors, {"reference": reference_errors}), {}, batch).loss.backward()

    def bare() -> None:
        clear()
        own = errors(policy)
        with torch.no_grad(), policy.adapters.disabled():
            frozen = errors(policy)
        finish(own, frozen)

    def naive() -> None:
        clear()
        with torch.no_grad():
            policy.encode_prompts(batch.prompts)
            policy.encode_images(pixels)
        halves = [slice(0, batch.size), slice(batch.size, 2 * batch.size)]
        own = torch.cat([errors(policy, rows) for rows in halves])
        with torch.no_grad(), naive_reference.adapters.disabled():
            frozen = torch.cat([errors(naive_reference, rows) for rows in halves])
        finish(own, frozen)

    def through_loop(ctx: Context, examples: ImageBatch) -> Step:
        update = GradientPass(strategy, ctx, trained, Processes())

        def step() -> None:
            clear()
            update(Update([examples]))

        return step

    cached = CachedReference(reference)
    pinned = replace(batch, cache_keys=list(batch.ids))
    kernel.frozen(Context(policy, cached), pinned, noised, Piece())  # fill the cache
    return {
        "bare": bare,
        "loop": through_loop(Context(policy, reference), batch),
        "cached": through_loop(Context(policy, cached), pinned),
        "naive": naive,
    }


def main(model: str = "tiny-sd", pairs: int = 4, rank: int = 16, repeats: int = 5, out: Path | None = None) -> None:
    """Measure and print.

    Args:
        model: bundled name, folder, or hub name.
        pairs: pairs in the step.
        rank: of the adapter.
        repeats: timed repetitions of each variant.
        out: JSON file for the figures.
    """
    policy = load_policy(model, device="cuda" if torch.cuda.is_available() else "cpu")
    batch, pixels = prepare(policy, pairs, rank)
    costs = {name: measure(step, policy, repeats) for name, step in variants(policy, batch, pixels).items()}
    base = costs["bare"]
    print(f"{'variant':<8} {'GFLOP':>9} {'x bare':>7} {'saved MiB':>10} {'x bare':>7} {'x time':>7}")
    for name, cost in costs.items():
        print(
            f"{name:<8} {cost.flops / 1e9:9.3f} {cost.flops / base.flops:7.3f} {cost.saved_bytes / 2**20:10.2f}"
            f" {cost.saved_bytes / base.saved_bytes:7.3f} {cost.seconds / base.seconds:7.2f}"
        )
    if out is not None:
        hardware = (
            torch.cuda.get_device_name()
            if torch.cuda.is_available()
            else f"{platform.machine()}, {os.cpu_count()} cores"
        )
        record = {"model": model, "pairs": pairs, "rank": rank, "hardware": hardware}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(
            json.dumps({**record, "costs": {name: asdict(cost) for name, cost in costs.items()}}, indent=1) + "\n",
            encoding="utf-8",
        )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
