"""Every image method that trains on given images, captions or a reward's gradient makes samples better, in seconds.

An image shall be as bright as its caption says; the start knows images of both signs and no captions. On-policy methods
are asked in ``test_on_policy.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

import pytest
import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.inference.generate import generate_latents
from diffalign.policies.base import Policy
from diffalign.rewards.function import FunctionReward
from diffalign.strategies.base import Strategy, Update
from diffalign.strategies.registry import get_method
from diffalign.training.processes import Processes
from diffalign.training.update import GradientPass
from tests.battery.methods import NAMES, PROCESSES, context, make
from tests.factories import ToyPolicy

CAPTIONS = ["x" * length + letter for length in range(2, 10, 2) for letter in "agmo"]
STEPS = 60
# TKTO and TDPO tell captions apart that are all a little right: with a large beta their losses are flat there
OPTIONS = {"inversion_dpo": {"warm_start_steps": 20}, "tkto": {"beta": 2.0}, "tdpo": {"beta": 2.0}}
INVERTED = ("inpo", "smpo")
"""An inversion is as good as the denoiser, and two numbers make a poor one where noise is predicted: what they take for
noise rises with the image. On the bundled model, which predicts noise, `inpo` is tried in ``tests/effects``."""


def wanted(policy: Policy, captions: Sequence[str]) -> Tensor:
    """How bright the images of captions shall be, (n,), all above 0."""
    return 2 * policy.encode_prompts(captions).tensors["prompt_embeds"].mean((1, 2))


def agreement(policy: Policy, seed: int) -> float:
    """How far the brightness of fresh samples follows their captions."""
    seeds = range(seed, seed + len(CAPTIONS))
    latents = generate_latents(policy, CAPTIONS, list(seeds), num_steps=8, guidance_scale=1.0)
    return float((latents.mean((1, 2, 3)) * wanted(policy, CAPTIONS)).mean())


@cache
def start(process: str) -> tuple[float, float]:
    """The two numbers of a model that was fitted to images of both signs."""
    policy, strategy = ToyPolicy(process, weight=(0.7, 0.0)), make("sft")
    learn(strategy, policy, lambda step: lesson("unpaired", policy, step))
    first, second = policy.module.q.tolist()
    return first, second


def learn(strategy: Strategy, policy: Policy, batch: Callable[[int], ImageBatch]) -> None:
    """Train for some steps."""
    bright = FunctionReward(lambda images, prompts: images.mean((1, 2, 3)), "bright", differentiable=True)
    ctx = context(policy, strategy, rewards={"bright": bright})
    trained = list(policy.adapters.parameters("default"))
    optimizer = torch.optim.Adam(trained, lr=1e-2)
    for step in range(STEPS):
        optimizer.zero_grad()
        GradientPass(strategy, ctx, trained, Processes())(Update([batch(step)]))
        optimizer.step()
        ctx.progress.step += 1
        strategy.after_step(ctx)


def lesson(kind: str, policy: Policy, seed: int) -> ImageBatch:
    """A batch of data of a kind: the first image of an example is as its caption says, the last is not."""
    factors = {"ranked_lists": (1.0, 0.3, -0.3, -1.0), "pairs": (1.0, -1.0), "caption_pairs": (1.0, -1.0)}.get(
        kind, (1.0,)
    )
    generator = torch.Generator().manual_seed(seed)
    count = len(CAPTIONS)
    order = [CAPTIONS[row] for row in torch.randperm(count, generator=generator)]
    bright = wanted(policy, order)[:, None, None, None]
    label = (torch.arange(count) % 2).float()
    fields = {"scores": torch.tensor([factors]).repeat(count, 1)} if len(factors) > 1 else {"label": label}
    if kind == "unpaired":
        bright = bright * (2 * label - 1)[:, None, None, None]
    shape = (count, *policy.latent_shape(*policy.default_resolution))
    images = [factor * bright + 0.3 * torch.randn(shape, generator=generator) for factor in factors]
    own = policy.encode_prompts(order)
    conditions = (own,) * len(images)
    others = order[1:] + order[:1]
    if kind in ("caption_pairs", "mismatched_captions"):
        conditions = (own, policy.encode_prompts(others))
    if kind == "mismatched_captions":
        images, fields = images * 2, {}
    return ImageBatch(
        ids=[f"{seed}-{row}" for row in range(count)],
        seeds=torch.arange(count) + count * seed,
        prompts=order,
        fields={} if kind == "prompts" else fields,
        latents=torch.cat(images)[: 0 if kind == "prompts" else None],
        conditions=conditions,
    )


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_their_captions_better(name: str, process: str) -> None:
    if name in INVERTED and process == "epsilon":
        pytest.skip("two numbers make no model that could be inverted")
    policy = ToyPolicy(process, weight=start(process))
    kind = get_method(name).strategy.spec.data
    before = agreement(policy, seed=10**6)
    learn(make(name, **OPTIONS.get(name, {})), policy, lambda step: lesson(kind, policy, step))
    after = agreement(policy, seed=10**6)
    assert after > before + 0.02
