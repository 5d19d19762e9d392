"""The rows of the board: which method starts from which model with which options, and how its images are drawn."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, get_args

from diffalign.bundled import is_bundled
from diffalign.errors import UserError, unknown
from diffalign.rewards.compose import parse_rewards
from diffalign.strategies.inversion_path import PathOwner
from diffalign.strategies.registry import Method, get_method, list_methods
from diffalign.training.config import TrainConfig
from diffalign.training.resolve import default_model, resolve_config, resolve_defaults
from diffalign.world.evaluation import PROXY

BASE = "base"
BEST_OF_4 = "best_of_4"
TINY_SD = "tiny-sd"
TINY_SD3 = "tiny-sd3"


@dataclass(frozen=True)
class Start:
    """A bundled model that rows start from.

    Args:
        guidance_scale: of test images: where the untrained model scores best on tune captions.
        policy: module of its policy.
        suffix: of the names of its baselines.
    """

    guidance_scale: float
    policy: str
    suffix: str = ""


STARTS: dict[str, Start] = {
    TINY_SD: Start(3.0, "diffalign.policies.unet"),
    TINY_SD3: Start(1.0, "diffalign.policies.sd3", suffix="_sd3"),
}


@dataclass(frozen=True)
class BoardSettings:
    """What is measured, of every row.

    Args:
        test_prompt_seed: draws the TEST captions and their initial noise.
        captions: number of test captions.
        num_steps: of sampling.
    """

    test_prompt_seed: int = 0
    captions: int = 400
    num_steps: int = 15

    def of(self, entry: Entry) -> dict[str, Any]:
        """Return everything that decides how a row is measured; rows of unlike settings cannot be compared."""
        return {
            "model": entry.model,
            "test_prompt_seed": self.test_prompt_seed,
            "captions": self.captions,
            "num_steps": self.num_steps,
            "guidance_scale": STARTS[entry.model].guidance_scale,
        }


@dataclass(frozen=True)
class Entry:
    """A row.

    Args:
        method: what is trained; None for baselines without training.
        model: what it starts from.
        options: of the run, over the preset's.
        learning_rate_factor: on the preset's learning rate.
        best_of: images drawn for each that is kept, by the proxy.
    """

    method: str | None
    model: str = TINY_SD
    options: Mapping[str, Any] = field(default_factory=dict)
    learning_rate_factor: float = 1.0
    best_of: int = 1

    @property
    def record(self) -> Method | None:
        """The method's entry in the table of methods."""
        return None if self.method is None else get_method(self.method)

    @property
    def base(self) -> str:
        """Name of the row that this one is compared with."""
        return BASE + STARTS[self.model].suffix

    @property
    def samples(self) -> bool:
        """Whether the method learns from images that it samples, and not from preference data alone."""
        record = self.record
        return record is not None and (bool(record.strategy.spec.needs_reward) or record.family == "self-play")

    @property
    def draws(self) -> int:
        """Initial noises of each test caption: two for methods that sample, and for what they are compared with."""
        return 2 if self.samples or (self.method is None and self.best_of == 1) else 1

    @property
    def available(self) -> bool:
        """Whether the model is bundled with this installation."""
        return is_bundled(self.model)

    @cached_property
    def rewards(self) -> dict[str, float]:
        """What the row itself aims at, with weights: its run's rewards; the proxy for self-play, which has none."""
        record = self.record
        if record is None or not self.samples:
            return {}
        if not record.strategy.spec.needs_reward:
            return {PROXY: 1.0}
        named = self.config(0).reward.rewards
        return {spec.label: spec.weight for spec in parse_rewards(named)} if named else {}

    def overrides(self, seed: int) -> dict[str, Any]:
        """Return the options of a run that differ from the preset of its model; nothing is evaluated during the run."""
        assert self.method is not None
        rate = resolve_defaults(self.method, self.model)["learning_rate"] * self.learning_rate_factor
        quiet = {"evaluation_prompts": 0, "num_validation_images": 0}
        model = {"pretrained_model_name_or_path": self.model}
        return {"learning_rate": rate, **self.options, **model, **quiet, "seed": seed}

    def config(self, seed: int) -> TrainConfig:
        """Return the whole configuration of a run."""
        assert self.method is not None
        return resolve_config(self.method, self.overrides(seed))


SMALL_FILES = "compressibility"
_ON_SMALL_FILES = {
    "rewards": SMALL_FILES,
    "rollout_guidance_scale": 1.0,
    "learning_rate": 3e-3,
    "lr_scheduler": "constant_with_warmup",
    "max_train_steps": 60,
}
_SHORT = {"max_train_steps": 60}
_TRUE_PICTURES = {"dataset_name": "rendered"}
_WARM_STEPS = 150
_FROM_PAIRS = {"beta": 1000.0, "train_batch_size": 8, "lr_scheduler": "constant_with_warmup"}
_WARM = {**_FROM_PAIRS, "warm_start": "diffusion_dpo", "warm_start_steps": _WARM_STEPS, "max_train_steps": 180}
_INVERSIONS = {
    f"inversion_{path}_{name}": Entry("inversion_dpo", options={**_WARM, "path": path, "sign": sign})
    for path in get_args(PathOwner)
    for name, sign in (("plus", 1), ("minus", -1))
}
"""Inversion-DPO's four forms from one warm start by Diffusion-DPO."""
VARIANTS: dict[str, Entry] = {
    "ddpo_jpeg": Entry("ddpo", options=_ON_SMALL_FILES),
    "d3po_jpeg": Entry("d3po", options=_ON_SMALL_FILES),
    "prdp_jpeg": Entry("prdp", options=_ON_SMALL_FILES),
    "ddpo_pickscore": Entry("ddpo", options={"rewards": PROXY, "max_train_steps": 100}),
    "ddpo_10x": Entry("ddpo", options=_SHORT, learning_rate_factor=10.0),
    "prdp_10x": Entry("prdp", options=_SHORT, learning_rate_factor=10.0),
    **{f"{method}_rendered": Entry(method, options=_TRUE_PICTURES) for method in ("sft", "seppo")},
    **_INVERSIONS,
    "inversion_start": Entry("diffusion_dpo", options={**_FROM_PAIRS, "max_train_steps": _WARM_STEPS}),
    "inversion_start_longer": Entry("diffusion_dpo", options={**_FROM_PAIRS, "max_train_steps": 850}),
}
"""Rows beside a method's own: DDPO's first task; the claims of papers (DDPO on AlignProp's reward, with eight times its
images; ten times the learning rate, which shows itself soon); Inversion-DPO's forms, what they start from, and as much
time spent on more of that; methods that imitate winners, on true pictures instead of the start's own samples."""


def entries() -> dict[str, Entry]:
    """Return all rows by name: baselines of each model, every image method that trains the model, variants."""
    baselines = {name + start.suffix: Entry(None, model) for model, start in STARTS.items() for name in (BASE,)}
    baselines |= {BEST_OF_4 + start.suffix: Entry(None, model, best_of=4) for model, start in STARTS.items()}
    methods = [method for method in list_methods("image") if method.strategy.spec.trains == "policy"]
    own = {method.name: Entry(method.name, default_model(method.strategy.spec)) for method in methods}
    return {**baselines, **own, **VARIANTS}


@dataclass(frozen=True)
class Cell:
    """A row's name and the seed it is trained with."""

    row: str
    seed: int = 0

    @staticmethod
    def parse(text: str) -> Cell:
        """Read ``row:seed``.

        Raises:
            UserError: for another form, or an unknown row.
        """
        name, _, seed = text.partition(":")
        known = entries()
        if name not in known:
            raise unknown("leaderboard row", name, known)
        if not (seed or "0").isdigit():
            raise UserError(f"{text!r} is no cell: expected METHOD:SEED, for example sft:0")
        return Cell(name, int(seed or 0))

    @property
    def entry(self) -> Entry:
        """What the row is."""
        return entries()[self.row]
