"""What the battery knows of image methods: data, small options, traits, and what a step costs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from diffalign.batch import Condition, ImageBatch
from diffalign.policies.base import Policy
from diffalign.references import AdaptersOff
from diffalign.strategies.base import Context, Strategy, Update
from diffalign.strategies.on_policy import FromRollouts
from diffalign.strategies.pair_loss import PairStrategy
from diffalign.strategies.registry import get_method, list_methods
from diffalign.training.processes import Processes
from diffalign.training.update import Account, GradientPass
from tests.factories import Ripples, ToyPolicy, image_batch

MOVES = 3


@dataclass(frozen=True)
class Described:
    """What the battery expects of a method. Most of it follows from its registration, see :func:`described`.

    Args:
        options: of its config, chosen so that steps are short and numbers moderate.
        pairs: the loss is that of a logit between a chosen and a rejected image, log 2 at the reference.
        even: the objective is even in (policy - reference), so that the first gradient is zero.
        inversion: predictions that each inversion move in ``draw`` takes; 0 where nothing is inverted.
        calls: denoiser calls of a step besides those: "reference", "policy" (without a graph), "trained" (with one);
            None where nothing is known of them.
        liked_sign: +1 where less error of liked images lowers the loss, -1 where more does, or where terms are rewards.
    """

    options: Mapping[str, Any]
    pairs: bool = False
    even: bool = False
    inversion: int = 0
    calls: Mapping[str, int] | None = None
    liked_sign: int = 1


# a live step is computed once more in backward
_TAIL = {"policy": MOVES - 1, "trained": 2}
SPECIAL: Mapping[str, Mapping[str, Any]] = {
    "inpo": {"inversion": 1},
    "smpo": {"inversion": 2},
    "inversion_dpo": {
        "options": {"warm_start_steps": 0},
        "even": True,
        "calls": {"reference": MOVES, "policy": MOVES, "trained": MOVES},
        "liked_sign": -1,
    },
    "mapo": {"options": {"beta": 0.1, "margin_scale": 10.0}},
    "seppo": {
        "options": {"flip": "none", "rollout_guidance_scale": 2.0},
        "calls": {"policy": MOVES + 1, "trained": 1},
    },
    "dro": {"options": {"margin": 10.0}, "calls": {"reference": 1, "policy": MOVES, "trained": 1}},
    "alignprop": {"calls": _TAIL},
    "draft_k": {"calls": _TAIL},
    "draft_lv": {"calls": {"policy": MOVES, "trained": 1}},
    "refl": {"options": {"earliest_jump": 0.9}, "calls": {"policy": MOVES - 1, "trained": 1}},
}
"""What does not follow from a method's registration; no other method needs an entry."""
_SHORT: Mapping[str, Any] = {
    "beta": 20.0,
    "num_inversion_steps": MOVES,
    "rollout_steps": MOVES,
    "rollout_guidance_scale": 1.0,
    "loss_form": "linear",
}
"""Options for short steps and moderate numbers, of methods that have them."""


def asked(strategy: type[Strategy]) -> bool:
    """Say whether the questions are for a method: those on rollouts are asked in ``test_on_policy``, and what trains no
    policy answers in tests of its own."""
    return strategy.spec.trains == "policy" and not issubclass(strategy, FromRollouts)


NAMES = [method.name for method in list_methods("image") if asked(method.strategy)]
PROCESSES = ["epsilon", "v_prediction", "flow"]


def described(name: str) -> Described:
    """Return what is expected of a method: from its registration, and where that does not tell, from `SPECIAL`."""
    strategy, special = get_method(name).strategy, dict(SPECIAL.get(name, {}))
    known = {f.name for f in fields(strategy.Config)}
    options = {option: value for option, value in _SHORT.items() if option in known} | special.pop("options", {})
    spec = strategy(strategy.Config(**options)).spec
    plain = {"trained": 1, **({"reference": 1} if spec.needs_reference else {})}
    derived = {
        "pairs": issubclass(strategy, PairStrategy) and spec.data != "winners",
        "calls": None if spec.lockstep == "none" else plain,
        "liked_sign": -1 if spec.needs_reward else 1,
    }
    return Described(options, **{**derived, **special})


PAIRS = [name for name in NAMES if described(name).pairs]


def make(name: str, **options: Any) -> Strategy:
    """Make a strategy with its battery options and others."""
    strategy = get_method(name).strategy
    return strategy(strategy.Config(**{**described(name).options, **options}))


def batch_for(name: str, policy: Policy, examples: int = 4, dtype: torch.dtype = torch.float32) -> ImageBatch:
    """Make a batch of the kind that a method needs."""
    kind = get_method(name).strategy.spec.data
    images = {"ranked_lists": 4, "pairs": 2, "caption_pairs": 2, "mismatched_captions": 2}.get(kind, 1)
    falling = torch.linspace(0.25, 0.17, images) * torch.linspace(1, 0.9, examples)[:, None]
    fields = {"scores": falling} if images > 1 else {"label": (torch.arange(examples) % 2).float()}
    own_captions = kind in ("caption_pairs", "mismatched_captions")
    batch = image_batch(policy, examples, images, own_captions=own_captions, **fields)
    if kind == "mismatched_captions":
        batch = replace(batch, latents=batch.latents[:examples].repeat(2, 1, 1, 1))
    if kind == "prompts":
        batch = replace(batch, latents=batch.latents[:0], fields={})
    fields = {name: value.to(dtype) for name, value in batch.fields.items()}
    return replace(batch, latents=batch.latents.to(dtype), fields=fields)


def select(batch: ImageBatch, examples: list[int]) -> ImageBatch:
    """Take some examples of a batch, in a given order."""
    rows = torch.tensor(examples)
    blocks = batch.latents.chunk(batch.images_per_example)
    conditions: dict[int, Condition] = {id(c): c.select(rows) for c in batch.conditions}
    return replace(
        batch,
        ids=[batch.ids[i] for i in examples],
        seeds=batch.seeds[rows],
        prompts=[batch.prompts[i] for i in examples],
        fields={name: value[rows] for name, value in batch.fields.items()},
        latents=torch.cat([block[rows] for block in blocks]) if len(batch.latents) else batch.latents,
        conditions=tuple(conditions[id(c)] for c in batch.conditions),
    )


def swapped(batch: ImageBatch) -> ImageBatch:
    """Exchange the first and the second image of pairs, with their captions."""
    return replace(batch, latents=batch.latents.roll(batch.size, 0), conditions=batch.conditions[::-1])


class CountingPolicy(ToyPolicy):
    """A toy policy that remembers who was asked, whether a graph was built, and in which mode."""

    def __init__(self, process: str = "epsilon", delta: tuple[float, float] = (0.0, 0.0), double: bool = False) -> None:
        super().__init__(process)
        self.module.delta["default"].data.copy_(torch.tensor(delta))
        if double:
            self.module.double()
        self.calls: Counter[str] = Counter()
        self.trained_rows = 0  # the largest pass with a graph

    @property
    def trained(self) -> torch.nn.Parameter:
        """The two trained numbers."""
        return self.module.delta["default"]

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        graph = torch.is_grad_enabled()
        self.calls["reference" if self.module.disable_adapters else "trained" if graph else "policy"] += 1
        self.trained_rows = max(self.trained_rows, len(latents) if graph else 0)
        return super().predict(latents, timesteps, condition)


def gradient(
    strategy: Strategy, policy: CountingPolicy, batches: list[ImageBatch], **options: Any
) -> tuple[Tensor, Account]:
    """Run one update through the loop's own gradient pass; return the gradient and the account."""
    ctx = context(policy, strategy, **options)
    policy.trained.grad = None
    account = GradientPass(strategy, ctx, [policy.trained], Processes())(Update(batches))
    return policy.trained.grad.clone(), account


def context(policy: Policy, strategy: Strategy, **options: Any) -> Context:
    """A context with a reward, whose reference is the policy without adapter; the strategy is built as at the start."""
    ctx = Context(policy, AdaptersOff(policy), **{"rewards": {"ripples": Ripples()}, **options})
    moved = policy.adapters.state_dict() if isinstance(policy, CountingPolicy) else {}
    kept = {name: value.clone() for name, value in moved.items()}
    for value in moved.values():
        value.zero_()
    strategy.build(ctx)
    for name, value in moved.items():
        value.copy_(kept[name])
    return ctx


def inversion_moves(timesteps: Tensor, num_train_timesteps: int = 1000) -> int:
    """How many moves the row with the latest timestep makes."""
    return max(1, math.ceil(float(timesteps.max()) * MOVES / num_train_timesteps))
