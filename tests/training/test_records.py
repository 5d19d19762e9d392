"""Run folders, trackers, the progress line, launching."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

import diffalign
from diffalign.cli.parser import parse_train
from diffalign.errors import UserError
from diffalign.strategies.base import Progress
from diffalign.strategies.ddpo import DDPO, DDPOConfig
from diffalign.training import runfolder
from diffalign.training.launch import missing_processes
from diffalign.training.processes import Processes
from diffalign.training.progress import ProgressDisplay, work_shown
from diffalign.training.report import PATIENCE, LeftOut, Reporter, Spent
from diffalign.training.resolve import resolve_config
from diffalign.training.runfolder import RunFolder, choose_folder, claim_folder, environment, model_card
from diffalign.training.step import StepResult
from diffalign.training.stopwatch import Stopwatch
from diffalign.training.trackers import JsonLines, build_trackers
from diffalign.training.update import Account
from diffalign.training.validation import save_grid, stack_pictures
from tests.meeting import Meeting, meet


def make_run(path: Path, method: str = "inpo") -> Path:
    RunFolder(path).record({"method": method})
    return path


def test_next_free_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert choose_folder("", "inpo", None) == Path("runs/inpo-001")
    make_run(Path("runs/inpo-001"))
    assert choose_folder("", "inpo", None) == Path("runs/inpo-002")
    assert choose_folder("", "dpo", None) == Path("runs/dpo-001")
    Path("runs/dpo-001").symlink_to("nowhere")
    assert claim_folder("", "dpo", None).path == Path("runs/dpo-002")


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    (folder / "checkpoints" / "step-00000003").mkdir(parents=True)
    with pytest.raises(UserError, match=r"already holds a run of 'inpo'.*--resume_from_checkpoint latest"):
        choose_folder(str(folder), "inpo", None)
    with pytest.raises(UserError, match=r"is a run of method 'inpo'.*'dpo'"):
        choose_folder(str(folder), "dpo", "latest")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "holiday.jpg").touch()
    with pytest.raises(UserError, match="already holds other files"):
        choose_folder(str(tmp_path / "other"), "inpo", None)


def test_where_to_resume(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    assert choose_folder(str(folder), "inpo", "latest") == folder
    assert choose_folder("", "inpo", str(folder / "checkpoints" / "step-00000003")) == folder.resolve()
    with pytest.raises(UserError, match="--output_dir"):
        choose_folder("", "inpo", "latest")
    with pytest.raises(UserError, match="not the folder of a run"):
        choose_folder(str(tmp_path), "inpo", "latest")


def test_an_empty_folder_may_be_used(tmp_path: Path) -> None:
    assert choose_folder(str(tmp_path), "inpo", None) == tmp_path


def test_runs_that_start_together_share_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: claim_folder("", "sft", None), range(8)))
    assert sorted(claim.path for claim in claims) == [Path(f"runs/sft-{number:03d}") for number in range(1, 9)]


def test_the_folder_of_a_going_run_is_refused(tmp_path: Path) -> None:
    for folder in (tmp_path / "new", tmp_path):
        claim = claim_folder(str(folder), "sft", None)
        with pytest.raises(UserError, match="in use by a run"):
            claim_folder(str(folder), "sft", None)
        claim.release()
        assert folder.exists() == (folder == tmp_path)  # what the claim made goes, as nothing came into it


def test_a_run_is_continued_once_at_a_time(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    first = claim_folder(str(tmp_path / "run"), "inpo", "latest")
    with pytest.raises(UserError, match="in use by a run that is going on: end that run first"):
        claim_folder(str(tmp_path / "run"), "inpo", "latest")
    first.release()
    claim_folder(str(tmp_path / "run"), "inpo", "latest").release()
    assert (tmp_path / "run" / "config.yaml").is_file()


def test_a_killed_continuation_holds_nothing(tmp_path: Path) -> None:
    make_run(tmp_path / "run")
    script = "import sys, time\nfrom diffalign.training.runfolder import claim_folder\n"
    script += "claim = claim_folder(sys.argv[1], 'inpo', 'latest')\nprint('claimed', flush=True)\ntime.sleep(60)\n"
    command = [sys.executable, "-c", script, str(tmp_path / "run")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "claimed\n"
        with pytest.raises(UserError, match="in use by a run"):
            claim_folder(str(tmp_path / "run"), "inpo", "latest")
        process.kill()
    claim_folder(str(tmp_path / "run"), "inpo", "latest").release()


def test_a_run_without_checkpoint_leaves_its_folder_free(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = claim_folder(str(folder), "inpo", None)
    make_run(folder)
    (folder / "checkpoints" / ".step-00000003.tmp").mkdir(parents=True)
    with pytest.raises(UserError, match="in use by a run"):
        claim_folder(str(folder), "inpo", None)
    first.release()
    with pytest.raises(UserError, match="already holds a run of 'inpo'"):
        claim_folder(str(folder), "dpo", None)
    claim_folder(str(folder), "inpo", None).release()
    assert not list(folder.iterdir())
    make_run(folder)
    (folder / "model_index.json").touch()
    with pytest.raises(UserError, match="already holds a run of 'inpo'"):
        claim_folder(str(folder), "inpo", None)


def test_an_unwritable_folder_cannot_be_claimed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the run folder"):
        claim_folder(str(tmp_path / "file" / "run"), "inpo", None)


def test_unwritable_folder_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write to the run folder"):
        RunFolder(tmp_path / "file" / "run").record({"method": "inpo"})


def test_only_a_checkout_of_this_code_has_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package may lie inside a repository of its user's, whose revision says nothing of it."""
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(tmp_path)]
    installed = tmp_path / "site-packages" / "runfolder.py"
    installed.parent.mkdir()
    installed.touch()
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(runfolder, "__file__", str(installed))
    assert environment()["git_revision"] is None
    subprocess.run([*git, "add", "."], check=True)
    assert len(environment()["git_revision"]) == 40


def test_environment_and_card() -> None:
    assert environment()["packages"]["safetensors"] != "not installed"
    config = {"pretrained_model_name_or_path": "tiny-sd", "seed": 3}
    card = model_card("inpo", "A paper", "diffusers", config, {"win_rate": 0.6}, 10, 40)
    assert "library_name: diffusers" in card
    assert "base_model: tiny-sd" in card
    assert "for 10 of 40 optimizer steps" in card
    assert "| seed | 3 |" in card
    assert '"win_rate": 0.6' in card


def test_resumed_log_drops_what_will_be_written_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 2.0}\n{"step": 3, "lo')
    tracker = JsonLines(path, resumed_from=1)
    tracker.log(2, {"loss": 3.0})
    tracker.close()
    assert [json.loads(line)["loss"] for line in path.read_text().splitlines()] == [1.0, 3.0]


def test_unknown_and_absent_trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    with pytest.raises(UserError, match="did you mean 'tensorboard'"):
        build_trackers(["tensorbord"], tmp_path, {})
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        build_trackers(["wandb"], tmp_path, {})


def test_a_resumed_run_continues_its_run_of_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    asked: list[str | None] = []

    def init(**options: Any) -> SimpleNamespace:
        asked.append(options["id"])
        return SimpleNamespace(id=options["id"] or "abc123")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for resumed_from in (0, 5):
        build_trackers(["wandb"], tmp_path, {}, resumed_from)
    assert asked == [None, "abc123"]


def test_tensorboard_writes_events(tmp_path: Path) -> None:
    save_grid(torch.rand(2, 3, 4, 4), tmp_path / "grid.png")
    _, board = build_trackers(["tensorboard"], tmp_path, {})
    board.log(1, {"loss": 0.5})
    board.image(1, "validation", tmp_path / "grid.png")
    board.close()
    assert list((tmp_path / "tensorboard").glob("events*"))


def test_tensorboard_curves_continue_where_a_run_resumes(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed_from, steps in ((0, (1, 2, 3)), (1, (2,))):
        _, board = build_trackers(["tensorboard"], tmp_path, {}, resumed_from)
        for step in steps:
            board.log(step, {"loss": float(10 * resumed_from + step)})
        board.close()
        time.sleep(1.1)  # files are read in the order of their names, which count seconds
    curves = EventAccumulator(str(tmp_path / "tensorboard"))
    curves.Reload()
    assert [(event.step, event.value) for event in curves.Scalars("loss")] == [(1, 1.0), (2, 12.0)]


def test_grids_and_stacks(tmp_path: Path) -> None:
    from PIL import Image

    images = torch.zeros(3, 3, 4, 4)
    images[1, 0] = 1.0
    save_grid(images, tmp_path / "deep" / "grid.png", columns=2)
    grid = Image.open(tmp_path / "deep" / "grid.png")
    assert grid.size == (10, 10)
    assert grid.getpixel((0, 0)) == (0, 0, 0)
    assert grid.getpixel((6, 0)) == (255, 0, 0)
    assert grid.getpixel((6, 6)) == (255, 255, 255)
    stack_pictures([("before", tmp_path / "deep" / "grid.png")] * 2, tmp_path / "both.png")
    assert Image.open(tmp_path / "both.png").size == (10, 48)


def test_rewards_without_any_difference_are_noted_once() -> None:
    console = Console(width=300, file=io.StringIO())
    display = ProgressDisplay(20, 0, torch.device("cpu"), console)
    spent, left_out = Spent(Progress(), Processes()), LeftOut(None, Processes())
    advise = DDPO(DDPOConfig()).advise
    reporter = Reporter(
        Processes(), [], display, Stopwatch(), spent, left_out, logging_steps=1, first=0, total=20, advise=advise
    )
    shares = [1.0] * (PATIENCE - 1) + [0.5] + [1.0] * (PATIENCE + 2)
    for step, share in enumerate(shares, 1):
        account = Account(1.0, {"flat_groups": torch.tensor(share)}, examples=1)
        reporter.step(step, StepResult(account, 0.1, 0.1, 1e-4, applied=True))
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert said.count("for 5 logging intervals all images of a caption have had the same reward") == (
            step >= 2 * PATIENCE
        )


def test_what_a_stream_leaves_out_is_told_when_it_has_doubled_and_at_the_end() -> None:
    def told(processes: Meeting) -> list[list[str]]:
        ties = {"ties dropped": 0} if processes.rank == 0 else {}
        images = {"images skipped": 0}
        left_out = LeftOut(lambda: {**ties, **images}, processes)  # type: ignore[arg-type]
        lines = [left_out.lines(only_news=True)]
        for tied, broken in ((1, 0), (1, 1), (1, 1), (4, 2)):
            ties.update({"ties dropped": tied} if ties else {})
            images["images skipped"] = broken
            lines.append(left_out.lines(only_news=True))
        return [*lines, left_out.lines()]

    first, second = (f"of the stream so far: {text}" for text in ("1 ties dropped", "1 ties dropped; 2 images skipped"))
    third = "of the stream so far: 4 ties dropped; 4 images skipped"
    assert meet(2, told) == [[[], [first], [second], [], [third], [third]]] * 2
    nothing = LeftOut(dict, Processes())
    assert (nothing.lines(only_news=True), nothing.lines()) == ([], ["of the stream so far: nothing left out"])


def test_progress_says_what_is_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(width=200, force_terminal=False)
    with ProgressDisplay(3, 0, torch.device("cpu"), console) as display:
        display.step(1, {"loss": 0.6931, "implicit_accuracy": 0.5, "examples_per_second": 12.0})
        display.forecast(Stopwatch(), examples=40, seconds=2.0, steps_left=100)
    said = capsys.readouterr().out
    assert "step 1/3  loss 0.6931  accuracy 0.5  samples/s 12  memory" in said
    assert "20 examples/s, about 0.0028 h to go" in said


@pytest.mark.parametrize("terminal", [False, True])
def test_work_before_the_first_step_is_shown_on_the_main_process(
    terminal: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffalign.training.progress._QUIET_SECONDS", 0.0)
    console = Console(width=200, file=io.StringIO(), force_terminal=terminal)
    for where in (console, None):
        with work_shown(where) as progress:
            for done in range(1, 4):
                progress("examples encoded", done, 30)
                progress("captions encoded", done, 3)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    assert "examples encoded" in said
    assert ("examples encoded: 2 of 30\ncaptions encoded: 2 of 3\n" in said) == (not terminal)
    assert ("3/30" in said) == terminal


@pytest.mark.parametrize(
    ("environment", "launcher", "expected"),
    [
        ({"MASTER_ADDR": "127.0.0.1"}, ["python", "accelerate", "launch", "--cpu", "--num_processes", "2", "t.py"], 2),
        ({"MASTER_ADDR": "127.0.0.1"}, ["accelerate", "launch", "--num-processes=3", "t.py"], 3),
        ({"MASTER_ADDR": "127.0.0.1"}, ["accelerate", "launch", "t.py"], 0),
        ({"MASTER_ADDR": "127.0.0.1", "RANK": "0"}, ["accelerate", "launch", "--num_processes", "2", "t.py"], 0),
        ({"MASTER_ADDR": "host"}, ["accelerate", "launch", "--num_machines", "2", "--num_processes", "4", "t.py"], 0),
        ({}, ["accelerate", "launch", "--num_processes", "2", "t.py"], 0),
        ({"MASTER_ADDR": "host"}, ["sh", "job.sh", "--num_processes", "2"], 0),
    ],
)
def test_processes_that_were_not_started(environment: dict[str, str], launcher: list[str], expected: int) -> None:
    assert missing_processes(environment, launcher) == expected


@pytest.mark.parametrize(
    ("launched", "given", "expected"),
    [
        ("no", [], "no"),
        ("no", ["--mixed_precision", "bf16"], "bf16"),
        ("bf16", [], "bf16"),
        ("fp16", ["--mixed_precision", "fp16"], "fp16"),
    ],
)
def test_mixed_precision_of_the_launcher_is_the_default(
    launched: str, given: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    config = parse_train(["--method", "sft", *given], "image", "train")
    assert config.optim.mixed_precision == expected
    assert resolve_config("sft", {given[0][2:]: given[1]} if given else {}) == config


@pytest.mark.parametrize(
    ("launched", "message"),
    [
        ("bf16", "configured for --mixed_precision bf16, but the run's own --mixed_precision is no"),
        ("fp8", "configured for --mixed_precision fp8: give it bf16, fp16 or no"),
    ],
)
def test_mixed_precision_that_contradicts_the_launcher_is_refused(
    launched: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", launched)
    with pytest.raises(UserError, match=message):
        diffalign.train([], method="sft", mixed_precision="no")
