"""What one counted zero token saves over the 256 that stand for Stable Diffusion 3's absent third text encoder.

    python -m benchmarks.counted_tokens [--model tiny-sd3] [--rows 32] [--repeats 5]

Both variants predict the same rows and go backward to the adapters; their predictions are equal but for rounding, and
the largest difference is printed. The stock pipeline computes the second one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jsonargparse import auto_cli
from torch import Tensor

from benchmarks.step_cost import Cost, measure
from diffalign.batch import Condition
from diffalign.errors import UserError
from diffalign.policies.adapters import LoraSettings
from diffalign.policies.base import Policy
from diffalign.policies.loading import load_policy


def conditions(policy: Policy, captions: list[str]) -> dict[str, Condition]:
    """Return the captions as the policy encodes them, and with every zero token written out.

    Raises:
        UserError: if the policy counts no tokens.
    """
    counted = policy.encode_prompts(captions)
    counts = counted.tensors.get("token_counts")
    if counts is None:
        raise UserError("this model has no repeated text tokens: expected Stable Diffusion 3 without its T5 encoder")
    full = dict(counted.tensors)
    full["prompt_embeds"] = full["prompt_embeds"].repeat_interleave(full.pop("token_counts")[0].long(), dim=1)
    return {"counted": counted, "written out": Condition(full)}


def compare(policy: Policy, rows: int, repeats: int = 0) -> tuple[Mapping[str, Cost], float]:
    """Measure both variants.

    Args:
        policy: with a trainable adapter.
        rows: images in a forward pass.
        repeats: timed repetitions; 0 does not time.

    Returns:
        the cost of each by name, and the largest difference between their predictions.
    """
    shape = policy.latent_shape(*policy.default_resolution)
    latents = torch.randn(rows, *shape, generator=torch.Generator().manual_seed(0))
    timesteps = torch.linspace(100.0, 900.0, rows)
    predictions: dict[str, Tensor] = {}
    costs = {}
    for name, condition in conditions(policy, [f"picture {row}" for row in range(rows)]).items():

        def step(name: str = name, condition: Condition = condition) -> None:
            predictions[name] = policy.predict(latents, timesteps, condition)
            predictions[name].square().mean().backward()

        costs[name] = measure(step, policy, repeats)
    counted, full = predictions.values()
    return costs, (counted - full).abs().max().item()


def main(model: str = "tiny-sd3", rows: int = 32, repeats: int = 5) -> None:
    """Measure and print.

    Args:
        model: bundled name, folder, or hub name.
        rows: images in a forward pass.
        repeats: timed repetitions of each variant.
    """
    policy = load_policy(model)  # tokens are counted on CPUs only
    policy.adapters.add("default", LoraSettings(rank=16))
    costs, difference = compare(policy, rows, repeats)
    base = costs["counted"]
    print(f"{'zero tokens':<12} {'x GFLOP':>8} {'x saved bytes':>14} {'x time':>7}")
    for name, cost in costs.items():
        ratios = cost.flops / base.flops, cost.saved_bytes / base.saved_bytes, cost.seconds / base.seconds
        print(f"{name:<12} {ratios[0]:8.3f} {ratios[1]:14.3f} {ratios[2]:7.2f}")
    print(f"largest difference between predictions: {difference:.2g}")


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
