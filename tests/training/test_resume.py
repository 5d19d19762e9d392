"""A run that was interrupted ends as if it had not been."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import UserError
from diffalign.training.checkpoint import RunIdentity, list_checkpoints
from diffalign.training.trackers import METRICS_FILE
from tests.interface.fakes import RunningStatistic
from tests.training.runs import train
from tests.training.support import OPTIM, everything, toy_trainer

ROOT = Path(__file__).resolve().parents[2]


class StopsItself(RunningStatistic):
    """Sends its own process a signal after a number of steps."""

    def after_step(self, ctx) -> None:  # type: ignore[no-untyped-def]
        if ctx.step == 5:
            os.kill(os.getpid(), signal.SIGTERM)


def test_five_and_five_steps_are_ten(tmp_path: Path) -> None:
    straight = toy_trainer(tmp_path / "straight")
    straight.fit()
    toy_trainer(tmp_path / "halves", StopsItself()).fit()
    resumed = toy_trainer(tmp_path / "halves", resume_from_checkpoint="latest")
    result = resumed.fit()
    assert result.steps == 10
    expected = everything(straight)
    got = everything(resumed)
    assert expected.keys() == got.keys()
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_adafactor_resumes_to_the_bit(model: str, pairs: str, tmp_path: Path) -> None:
    """Its state is rows and columns for matrices, whole for vectors, and a number of steps."""
    changes = {"train_mode": "full", "optimizer": "adafactor", "learning_rate": 1e-4, "num_validation_images": 0}
    train(pairs, model, tmp_path / "straight", **changes)
    train(pairs, model, tmp_path / "halves", **changes, max_train_steps=2)
    train(pairs, model, tmp_path / "halves", **changes, resume_from_checkpoint="latest")
    for name in ("weights", "state"):
        file = f"checkpoints/step-00000004/{name}.safetensors"
        straight, halves = load_file(tmp_path / "straight" / file), load_file(tmp_path / "halves" / file)
        assert straight.keys() == halves.keys()
        assert all(torch.equal(value, halves[key]) for key, value in straight.items())


def test_an_average_switched_on_at_resume_begins_at_the_trained_weights(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "run", steps=6, optim=dataclasses.replace(OPTIM, use_ema=False)).fit()
    resumed = toy_trainer(tmp_path / "run", steps=6, resume_from_checkpoint="latest")
    resumed.fit()
    average, weights = resumed._stepper.state_dict()["average"], resumed.trainables.state_dict()
    assert average.keys() == weights.keys()
    for name, value in weights.items():
        assert torch.equal(average[name], value)
        assert average[name].data_ptr() != value.data_ptr()


def test_resumed_metrics_continue_the_file(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "straight").fit()
    toy_trainer(tmp_path / "halves", StopsItself()).fit()
    toy_trainer(tmp_path / "halves", resume_from_checkpoint="latest").fit()
    curves = []
    for name in ("straight", "halves"):
        lines = [json.loads(line) for line in (tmp_path / name / METRICS_FILE).read_text().splitlines()]
        curves.append([(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines])
    assert curves[0] == curves[1]


def test_a_signal_saves_exports_and_returns(tmp_path: Path) -> None:
    result = toy_trainer(tmp_path / "run", StopsItself()).fit()
    assert result.interrupted == "SIGTERM"
    assert result.steps == 5
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["step-00000005"]
    assert (tmp_path / "run" / "toy.pt").is_file()


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (RunIdentity("other", "toy", "lora", 0, ""), "method is 'fake', this run's is 'other'"),
        (RunIdentity("fake", "toy", "lora", 8, ""), "rank is 0, this run's is 8"),
        (RunIdentity("fake", "toy", "lora", 0, "adapter:start:12"), "reference is ''"),
    ],
)
def test_another_run_is_refused(other: RunIdentity, message: str, tmp_path: Path) -> None:
    toy_trainer(tmp_path / "run", steps=1).fit()
    with pytest.raises(UserError, match="cannot resume") as error:
        toy_trainer(tmp_path / "run", identity=other, resume_from_checkpoint="latest").fit()
    assert message in str(error.value)


def test_a_broken_checkpoint_is_passed_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    straight = toy_trainer(tmp_path / "straight", steps=6)
    straight.fit()
    toy_trainer(tmp_path / "run", steps=6, checkpointing_steps=2).fit()
    last = list_checkpoints(tmp_path / "run" / "checkpoints")[-1]
    weights = last / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-5])
    resumed = toy_trainer(tmp_path / "run", steps=6, resume_from_checkpoint="latest")
    said: list[str] = []
    resumed._say = lambda *lines: said.extend(lines)  # type: ignore[method-assign]
    resumed.fit()
    assert any("passed over" in line and "weights.safetensors" in line for line in said)
    assert torch.equal(resumed.ctx.policy.adapters.vector(), straight.ctx.policy.adapters.vector())


def _start(folder: Path, resume: bool) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.training.killable", str(folder), "resume" if resume else "new"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=environment)


def _kill_and_resume(folder: Path, kills: int, seed: int) -> torch.Tensor:
    """Kill a run several times at random moments after its first checkpoint, then let it end."""
    rng = random.Random(seed)
    resume = False
    for _ in range(kills):
        process = _start(folder, resume)
        checkpoints = folder / "checkpoints"
        known = set(list_checkpoints(checkpoints)) if checkpoints.exists() else set()
        while process.poll() is None and not (set(list_checkpoints(checkpoints)) - known):
            time.sleep(0.01)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.wait()
        resume = True
    assert _start(folder, resume).wait() == 0
    return torch.load(folder / "toy.pt", weights_only=True)["default"]


def test_a_killed_run_resumes(tmp_path: Path) -> None:
    straight = toy_trainer(tmp_path / "straight", steps=40, checkpointing_steps=1)
    straight.fit()
    expected = torch.load(tmp_path / "straight" / "toy.pt", weights_only=True)["default"]
    assert torch.equal(_kill_and_resume(tmp_path / "killed", kills=1, seed=0), expected)


@pytest.mark.slow
def test_ten_kills(tmp_path: Path) -> None:
    straight = toy_trainer(tmp_path / "straight", steps=40, checkpointing_steps=1)
    straight.fit()
    expected = torch.load(tmp_path / "straight" / "toy.pt", weights_only=True)["default"]
    assert torch.equal(_kill_and_resume(tmp_path / "killed", kills=10, seed=1), expected)
