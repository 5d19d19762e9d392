"""A run that a signal has stopped leaves what a finished one leaves, and says that it is none."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.cli.main import main
from diffalign.policies.saving import read_lora_metadata
from diffalign.strategies.base import Strategy
from diffalign.training import loop
from diffalign.training.signals import StopRequest
from tests.interface.fakes import RunningStatistic
from tests.meeting import Meeting, meet
from tests.training.runs import LORA, options, train
from tests.training.support import toy_trainer


@pytest.fixture
def stopped_after(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """``stopped_after(2, signal.SIGTERM)``: every run sends itself a signal after a number of steps."""

    def arrange(steps: int, number: int) -> None:
        def after_step(self: Strategy, ctx) -> None:  # type: ignore[no-untyped-def]
            if ctx.step == steps:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(Strategy, "after_step", after_step)

    return arrange


def test_a_stopped_run_is_loadable_and_continued(
    stopped_after, model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import StableDiffusionPipeline

    run = tmp_path / "run"
    stopped_after(2, signal.SIGTERM)
    result, said = train(pairs, model, run)
    assert (result.interrupted, result.steps) == ("SIGTERM", 2)
    assert f"SIGTERM received: stopped after step 2 of 4; the weights so far are in {run}" in said
    assert f"--output_dir {run} --resume_from_checkpoint latest" in said
    StableDiffusionPipeline.from_pretrained(model).load_lora_weights(str(run))
    metadata = read_lora_metadata(run / LORA)
    assert (metadata["train_steps"], metadata["max_train_steps"]) == ("2", "4")
    assert "for 2 of 4 optimizer steps" in (run / "README.md").read_text()
    assert not (run / "summary.json").exists()  # what is measured at the end was not

    monkeypatch.undo()
    result, _ = train(pairs, model, run, resume_from_checkpoint="latest")
    assert (result.interrupted, result.steps) == (None, 4)
    assert read_lora_metadata(run / LORA)["train_steps"] == "4"
    train(pairs, model, tmp_path / "straight")
    expected, got = load_file(tmp_path / "straight" / LORA), load_file(run / LORA)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_ends_in_order(
    stopped_after, model: str, pairs: str, tmp_path: Path, number: int, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped_after(1, number)
    given = options(model, tmp_path / "run", dataset_name=pairs, num_validation_images=0)
    assert main(["train", "--method", "sft", *(f"--{name}={value}" for name, value in given.items())]) == 0
    assert (tmp_path / "run" / LORA).is_file()
    assert f"{signal.Signals(number).name} received: stopped after step 1" in capsys.readouterr().out


def test_a_stop_that_one_process_hears_stops_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch systems may signal one process alone."""
    own = threading.local()

    class Heard(StopRequest):
        def __init__(self) -> None:
            super().__init__()
            own.stop = self

    class OneHears(RunningStatistic):
        def after_step(self, ctx) -> None:  # type: ignore[no-untyped-def]
            if ctx.step == 3 and ctx.rank == 1:
                own.stop.signal = "SIGTERM"

    def run(processes: Meeting) -> tuple[int, str | None]:
        strategy = OneHears()
        result = toy_trainer(tmp_path / str(processes.rank), strategy, steps=6, processes=processes).fit()
        return result.steps, result.interrupted

    monkeypatch.setattr(loop, "StopRequest", Heard)
    assert meet(2, run) == [(3, "SIGTERM")] * 2
