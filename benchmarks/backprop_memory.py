"""What backpropagation through the sampler keeps for backward, by the number of steps that carry a gradient.

    python benchmarks/backprop_memory.py [--model tiny-sd] [--images 2] [--steps 1,2,4,8,16] [--out FILE]

Bytes are those of all tensors saved for backward of the rewards of sampled images (each storage once; weights not
counted), with checkpointed steps and without. With it, a further step adds the latents before it and next to nothing
else; the rest is decoder and reward.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jsonargparse import auto_cli
from torch import Tensor

from diffalign.diffusion.differentiable import sample_with_gradient
from diffalign.diffusion.guidance import guided
from diffalign.policies.adapters import LoraSettings
from diffalign.policies.base import Policy
from diffalign.policies.components import PipelinePolicy
from diffalign.policies.loading import load_policy
from diffalign.rewards.base import Reward
from diffalign.rewards.loading import load_reward


@dataclass(frozen=True)
class Kept:
    """What is kept for backward.

    Args:
        steps: sampling steps, all of which carry a gradient.
        checkpointed: bytes with checkpointed steps.
        plain: bytes without.
        latents: bytes of the latents of all images.
    """

    steps: int
    checkpointed: int
    plain: int
    latents: int


def saved_bytes(forward: Callable[[], Tensor], weights: Iterable[Tensor]) -> int:
    """Return the bytes that a forward pass saves for backward, those of ``weights`` left out."""
    known = {weight.untyped_storage().data_ptr() for weight in weights}
    saved: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = forward()  # kept alive: a storage that is freed could be counted as another one's
    total = sum(saved.values())
    del result
    return total


def measure(policy: Policy, reward: Reward, steps: int, images: int, guidance_scale: float = 5.0) -> Kept:
    """Count for one number of steps.

    Args:
        policy: with a trainable adapter.
        reward: differentiable.
        steps: sampling steps.
        images: sampled together.
        guidance_scale: of the samples.
    """
    prompts = [f"picture {index}" for index in range(images)]
    condition, null = policy.encode_prompts(prompts), policy.null_condition(images)
    shape = policy.latent_shape(*policy.default_resolution)
    noise = torch.randn(images, *shape, generator=torch.Generator().manual_seed(0)).to(policy.device)
    grid = policy.process.sampling_grid(steps)

    def rewards(checkpointing: bool) -> Tensor:
        predict = guided(policy.predict, condition, null, guidance_scale)
        latents = sample_with_gradient(
            predict, policy.process, noise, grid, [True] * steps, checkpointing=checkpointing
        )
        return reward.score(policy.decode(latents), prompts)

    weights = list(policy.module.parameters())
    if isinstance(policy, PipelinePolicy):
        weights += [weight for part in policy.parts for weight in part.parameters()]
    kept = [saved_bytes(lambda on=on: rewards(on), weights) for on in (True, False)]  # type: ignore[misc]
    return Kept(steps, kept[0], kept[1], noise.nbytes)


def main(
    model: str = "tiny-sd",
    reward: str = "tiny-pickscore",
    images: int = 2,
    steps: list[int] | None = None,
    out: Path | None = None,
) -> None:
    """Measure and print.

    Args:
        model: bundled name, folder, or hub name.
        reward: name of a differentiable reward.
        images: sampled together.
        steps: numbers of sampling steps.
        out: JSON file for the figures.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    policy = load_policy(model, device=device)
    policy.adapters.add("default", LoraSettings(rank=16))
    judge = load_reward(reward, device)
    rows = [measure(policy, judge, count, images) for count in steps or [1, 2, 4, 8, 16]]
    print(f"{'steps':>5} {'checkpointed MiB':>17} {'latents a step':>15} {'plain MiB':>10}")
    for before, row in zip([None, *rows], rows, strict=False):
        grown = (row.checkpointed - before.checkpointed) / (row.steps - before.steps) if before else float("nan")
        print(f"{row.steps:5d} {row.checkpointed / 2**20:17.3f} {grown / row.latents:15.3f} {row.plain / 2**20:10.2f}")
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        record = {"model": model, "reward": reward, "images": images, "kept": [asdict(row) for row in rows]}
        out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
