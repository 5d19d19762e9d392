"""Whole runs of an on-policy method from options: captions and rewards by name, resume, failures, two processes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

import diffalign
from diffalign.errors import RunStopped, UserError
from diffalign.rewards.jpeg import JpegSize
from diffalign.training.trackers import METRICS_FILE
from tests.factories import save_tiny

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--main_process_port", "0"]
LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("sd", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five captions: a rollout of two leaves one for the last of an epoch."""
    path = tmp_path_factory.mktemp("prompts") / "captions.txt"
    path.write_text("".join(f"a {letter}\n" for letter in "bcdef"))
    return str(path)


def options(model: str, prompts: str, folder: Path, **changes: Any) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": model,
        "prompts": prompts,
        "rewards": "incompressibility",
        "output_dir": str(folder),
        "rank": 2,
        "train_batch_size": 1,
        "global_batch_pairs": 2,
        "images_per_prompt": 2,
        "rollout_steps": 2,
        "max_train_steps": 6,
        "learning_rate": 1e-2,
        "clip_range": 0.1,
        "num_validation_images": 0,
        **changes,
    }


def train(model: str, prompts: str, folder: Path, **changes: Any) -> Any:
    console = Console(file=io.StringIO(), width=200)
    return diffalign.train(method="ddpo", console=console, **options(model, prompts, folder, **changes))


def curve(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def start(command: list[str], flags: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    """Run a training in processes of its own."""
    options = [f"--{name}={value}" for name, value in flags.items()]
    words = [sys.executable, "-m", *command, "--method", "ddpo", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False)


def test_a_run_killed_within_a_rollout_repeats_its_rewards(model: str, prompts: str, tmp_path: Path) -> None:
    train(model, prompts, tmp_path / "straight", checkpointing_steps=1)
    lines = curve(tmp_path / "straight")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[0]["reward"] == lines[1]["reward"] != lines[2]["reward"]  # two updates a rollout
    assert lines[0]["ratio"] == pytest.approx(1.0, abs=1e-4)

    flags = options(model, prompts, tmp_path / "killed", checkpointing_steps=1)
    assert start(["tests.training.killed_while_scoring"], flags).returncode == -signal.SIGKILL
    assert 0 < len(curve(tmp_path / "killed")) < 6
    result = train(model, prompts, tmp_path / "killed", checkpointing_steps=1, resume_from_checkpoint="latest")
    assert result.steps == 6
    again = curve(tmp_path / "killed")
    for name in ("step", "reward", "reward_std", "loss", "grad_norm", "images"):
        assert [line[name] for line in again] == [line[name] for line in lines]
    assert [line["images"] for line in lines] == [4, 4, 8, 8, 10, 10]  # the fifth caption comes alone
    seconds = [line["seconds"] for line in again]
    assert seconds == sorted(seconds)
    expected, got = load_file(tmp_path / "straight" / LORA), load_file(tmp_path / "killed" / LORA)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_a_reward_that_fails_stops_the_run_or_is_counted(
    model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = JpegSize.score

    def odd(self: JpegSize, images: Tensor, prompts: Any, metadata: Any = None) -> Tensor:
        return torch.where(torch.tensor([p == "a c" for p in prompts]), torch.nan, score(self, images, prompts))

    monkeypatch.setattr(JpegSize, "score", odd)
    with pytest.raises(UserError, match="gave nan for 'a c' with seed"):
        train(model, prompts, tmp_path / "stop")
    saved = list((tmp_path / "stop" / "failures").glob("seed-*.json"))
    assert json.loads(saved[0].read_text())["prompt"] == "a c"
    threads = set(threading.enumerate())
    train(model, prompts, tmp_path / "skip", on_reward_failure="skip")
    assert not {thread.name for thread in set(threading.enumerate()) - threads if "Pool" in thread.name}
    lines = curve(tmp_path / "skip")
    assert sorted({line["failed_images"] for line in lines}) == [0.0, 2.0]
    assert all(line["reward"] > 0 for line in lines)

    monkeypatch.setattr(
        JpegSize, "score", lambda self, images, prompts, metadata=None: torch.full((len(images),), 1e999)
    )
    with pytest.raises(UserError, match="no image of the rollout could be judged"):
        train(model, prompts, tmp_path / "all", on_reward_failure="skip")


def test_a_reward_that_fails_costs_no_step(
    model: str, prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It fails in the third rollout, before any update of it; once it works the run continues as if it always had."""
    train(model, prompts, tmp_path / "straight")
    score, calls = JpegSize.score, iter(range(100))

    def breaks(self: JpegSize, *args: Any, **kwargs: Any) -> Tensor:
        if next(calls) >= 2:
            raise ConnectionError("the scorer is gone")
        return score(self, *args, **kwargs)

    monkeypatch.setattr(JpegSize, "score", breaks)
    with pytest.raises(RunStopped, match=r"ConnectionError: the scorer is gone.* ended with are in"):
        train(model, prompts, tmp_path / "run")
    monkeypatch.undo()
    assert train(model, prompts, tmp_path / "run", resume_from_checkpoint="latest").steps == 6
    expected, got = load_file(tmp_path / "straight" / LORA), load_file(tmp_path / "run" / LORA)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_epochs_are_passes_over_the_captions(model: str, prompts: str, tmp_path: Path) -> None:
    """A rollout of four images cannot fill six updates: there are fewer steps than planned, not more passes."""
    once = {"max_train_steps": 0, "num_train_epochs": 1, "updates_per_rollout": 6}
    result = train(model, prompts, tmp_path / "run", **once)
    assert result.steps < 18
    assert curve(tmp_path / "run")[-1]["images"] == 10  # two of each of the five captions


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no reward": ({"rewards": ""}, "name one or more with --rewards"),
    "unknown reward": ({"rewards": "incompresibility"}, "did you mean 'incompressibility'"),
    "no description": ({"rewards": "graded"}, "reads a description of each caption"),
    "pinned draws": ({"pinned_draws": 1}, "leave the option out"),
    "dropout": ({"lora_dropout": 0.1}, "compares densities .* --lora_dropout would falsify: leave it out"),
    "no randomness": ({"eta": 0.0}, "without randomness"),
    "no steps": ({"rollout_steps": 0}, "expected 1 or more"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_told_before_the_first_step(mistake: str, model: str, prompts: str, tmp_path: Path) -> None:
    changes, message = MISTAKES[mistake]
    with pytest.raises(UserError, match=message):
        train(model, prompts, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_options_of_rewards_belong_to_methods_that_use_them(model: str, prompts: str, tmp_path: Path) -> None:
    shared = {"pretrained_model_name_or_path": model, "output_dir": str(tmp_path / "run")}
    with pytest.raises(UserError, match="uses no reward"):
        diffalign.train(method="sft", rewards="clip", **shared)
    with pytest.raises(UserError, match="--prompts is for methods"):
        diffalign.train(method="sft", prompts=prompts, **shared)


def test_two_processes_have_the_rewards_of_one(model: str, prompts: str, tmp_path: Path) -> None:
    train(model, prompts, tmp_path / "one", kl_beta=0.1, advantage="group")
    flags = options(model, prompts, tmp_path / "two", kl_beta=0.1, advantage="group")
    done = start([*LAUNCH, str(ROOT / "train_scripts" / "train.py")], flags)
    assert done.returncode == 0, done.stderr[-4000:]
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert a["images"] == b["images"]
        assert a["reward"] == pytest.approx(b["reward"], rel=1e-4)
        assert a["reward_std"] == pytest.approx(b["reward_std"], rel=1e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)
