"""A held-out reward ends a run, and the weights of its best moment are what is left."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import diffalign
from diffalign.errors import RunStopped, UserError
from diffalign.strategies.base import Update
from diffalign.training.checkpoint import list_checkpoints
from diffalign.training.trackers import METRICS_FILE, Tracker
from tests.factories import save_tiny
from tests.training.support import OPTIM, toy_trainer

CURVE = [0.1, 0.5, 0.9, 0.4, 0.9, 0.8, 1.5]
"""What is seen at the start and after each step: best after two steps, then three looks without a new best."""


class Watcher:
    """Sees a fixed curve, and remembers the weights it was shown."""

    def __init__(self, trainer: Any, curve: Sequence[float | None] = CURVE) -> None:
        self._trainer, self._curve = trainer, curve
        self.shown: dict[int, Tensor] = {}
        self.last: Tensor | None = None

    def _vector(self) -> Tensor:
        return self._trainer.ctx.policy.adapters.vector().clone()

    def before(self, folder: Any) -> float | None:
        self.shown[0] = self._vector()
        return self._curve[0]

    def during(self, step: int, folder: Any, trackers: Sequence[Tracker]) -> float | None:
        self.shown[step] = self._vector()
        return self._curve[step]

    def after(self, step: int, folder: Any, trackers: Sequence[Tracker]) -> dict[str, Any]:
        self.last = self._vector()
        return {}


def watched(folder: Path, curve: Sequence[float | None] = CURVE, **run: Any) -> tuple[Any, Watcher]:
    trainer = toy_trainer(folder, steps=20, optim=OPTIM, validation_steps=1, **run)
    trainer._observer = watcher = Watcher(trainer, curve)
    return trainer, watcher


def test_the_run_ends_and_the_best_weights_are_exported(tmp_path: Path) -> None:
    trainer, watcher = watched(tmp_path / "run")
    said: list[str] = []
    trainer._say = lambda *lines: said.extend(lines)
    result = trainer.fit()
    assert (result.steps, result.stopped_early, result.interrupted) == (5, True, None)
    exported = torch.load(tmp_path / "run" / "toy.pt", weights_only=True)["default"]
    assert torch.equal(exported, watcher.shown[2])  # a moving average, as it was looked at
    assert watcher.last is not None
    assert torch.equal(watcher.last, watcher.shown[2])
    assert not torch.equal(trainer.ctx.policy.adapters.vector(), watcher.shown[2])
    assert "after step 2 (0.9) for 3 validations" in said[-1]


def test_the_start_counts_as_a_moment(tmp_path: Path) -> None:
    trainer, watcher = watched(tmp_path / "run", [1.0, 0.9, 0.95, 0.8], early_stop_patience=3)
    assert trainer.fit().steps == 3
    assert torch.equal(torch.load(tmp_path / "run" / "toy.pt", weights_only=True)["default"], watcher.shown[0])


@pytest.mark.parametrize("curve", [[float("nan")], [0.1, 0.5, float("nan")]])
def test_a_value_that_cannot_be_compared_ends_the_run_by_a_message(curve: list[float | None], tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path / "run", curve)
    done = len(curve) - 1
    with pytest.raises(RunStopped, match=f"held-out reward after step {done} is nan") as stopped:
        trainer.fit()
    saved = [folder.name for folder in list_checkpoints(tmp_path / "run" / "checkpoints")]
    assert saved == ([f"step-{done:08d}"] if done else [])  # the start needs no checkpoint
    assert ("ended with are in" in str(stopped.value)) == bool(done)


def test_the_run_ends_within_a_rollout(tmp_path: Path) -> None:
    """The updates of a rollout that are left would be taken for nothing, and measured with the best weights."""
    trainer, watcher = watched(tmp_path / "run")
    trainer.strategy.collect = lambda ctx, batches: [Update(batches)] * 8
    assert trainer.fit().steps == 5
    assert sorted(watcher.shown) == [0, 1, 2, 3, 4, 5]


def test_nothing_watched_ends_nothing(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path / "run", [None] * 21)
    result = trainer.fit()
    assert (result.steps, result.stopped_early) == (20, False)


def test_patience_survives_an_interruption(tmp_path: Path) -> None:
    trainer, before = watched(tmp_path / "run", checkpointing_steps=4)

    def die(step: int, folder: Any, trackers: Any) -> float:
        if step == 5:
            raise KeyboardInterrupt
        return Watcher.during(before, step, folder, trackers)  # type: ignore[return-value]

    before.during = die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    resumed, _ = watched(tmp_path / "run", resume_from_checkpoint="latest")
    assert resumed.fit().steps == 5
    assert torch.equal(torch.load(tmp_path / "run" / "toy.pt", weights_only=True)["default"], before.shown[2])


def test_the_best_weights_are_a_copy_in_main_memory(tmp_path: Path) -> None:
    trainer, _ = watched(tmp_path / "run", [0.5, 0.1, 0.1, 0.1])
    trainer.fit()
    (name, best), *_ = trainer._early_stop.state_dict()["weights"].items()
    weight = trainer.trainables.named[name]
    assert best.device == torch.device("cpu")
    assert best.data_ptr() != weight.data_ptr()
    before, storage = weight.detach().clone(), weight.data_ptr()
    with trainer._early_stop.best():
        assert torch.equal(weight, best)
    assert torch.equal(weight, before)
    assert weight.data_ptr() in (storage, before.data_ptr())
    assert not torch.equal(weight, best)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("sft", {"early_stop_reward": "clip"}, "--validation_steps: give that too"),
        ("sft", {"early_stop_patience": 0}, "early_stop_patience is 0: expected 1 or more"),
        ("dpo", {"early_stop_reward": "clip", "validation_steps": 1}, "judges images"),
        (
            "ddpo",
            {"early_stop_reward": "incompressibility", "rewards": "incompressibility", "validation_steps": 1},
            "is trained on and cannot tell when to stop",
        ),
    ],
)
def test_contradictions_are_refused(method: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        diffalign.train([], method=method, **options)


def test_a_run_logs_what_it_watches_and_how_far_it_drifted(tmp_path: Path) -> None:
    from PIL import Image

    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    result = diffalign.train(
        [{"prompt": "a red square", "images": [str(tmp_path / "red.png")]}] * 2,
        method="sft",
        pretrained_model_name_or_path=str(save_tiny("sd", tmp_path / "model")),
        output_dir=str(tmp_path / "run"),
        validation_prompts=["a circle", "a star"],
        early_stop_reward="incompressibility",
        validation_steps=1,
        num_inference_steps=1,
        max_train_steps=3,
        learning_rate=0.1,
        rank=2,
    )
    lines = [json.loads(line) for line in (result.folder / METRICS_FILE).read_text().splitlines()]
    by_step = {step: {k: v for line in lines if line["step"] == step for k, v in line.items()} for step in (1, 2, 3)}
    for step in range(1, result.steps + 1):
        assert by_step[step]["drift/latent"] > 0
        assert by_step[step]["drift/pixel"] > 0
        assert by_step[step]["drift/prediction"] > 0
        assert by_step[step].keys() >= {"samples/colourfulness", "samples/diversity", "loss"}
    assert "validation/incompressibility" in by_step[1]
    assert result.summary["rewards"].keys() == {"incompressibility"}
    assert result.summary["samples"]["drift/latent"] == by_step[result.steps]["drift/latent"]
    assert json.loads((result.folder / "summary.json").read_text()) == result.summary
