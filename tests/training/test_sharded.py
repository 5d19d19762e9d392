"""A network in shards over two processes does what it does whole in one: FSDP2 on CPUs, started as a user starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from diffalign.errors import UserError
from diffalign.training.processes import Processes
from diffalign.training.trackers import METRICS_FILE
from tests.training.runs import LORA, ROOT, curve, train
from tests.training.train_sharded import RUNS

UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def sharded(model: str, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of all runs in two processes."""
    folder = tmp_path_factory.mktemp("sharded")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--use_fsdp", "--fsdp_version", "2"]
    command += ["--num_processes", "2", "-m", "tests.training.train_sharded", model, pairs, str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


def test_each_process_keeps_half_of_the_weights(sharded: Path) -> None:
    shares = [json.loads((sharded / f"{rank}.json").read_text())["share"] for rank in range(2)]
    assert sum(shares) == pytest.approx(1.0)
    assert shares[0] == pytest.approx(0.5, abs=0.05)


@pytest.mark.usefixtures("one_thread")
def test_half_precision_rounds_in_shards_as_it_does_whole(
    sharded: Path, model: str, pairs: str, tmp_path: Path
) -> None:
    train(pairs, model, tmp_path / "one", **RUNS["bf16"])
    (one,), (two,) = curve(tmp_path / "one"), curve(sharded / "bf16")
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=2e-2)


@pytest.mark.usefixtures("one_thread")
def test_processes_see_together_what_one_sees(sharded: Path, model: str, pairs: str, tmp_path: Path) -> None:
    train(pairs, model, tmp_path / "one", **RUNS["watched"])
    for a, b in zip(*(seen(folder / name) for folder, name in ((tmp_path, "one"), (sharded, "watched"))), strict=True):
        assert a == pytest.approx(b, rel=1e-2)


def seen(folder: Path) -> list[dict[str, float]]:
    """The lines of validations."""
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    found = [line for line in lines if "loss" not in line]
    assert any("validation/incompressibility" in line for line in found)
    return found


def test_the_best_weights_of_shards_come_back(sharded: Path) -> None:
    assert all(json.loads((sharded / f"{rank}.json").read_text())["best"] for rank in range(2))


@pytest.mark.parametrize("name", ["full", "lora", "inpo", "kto"])
@pytest.mark.usefixtures("one_thread")
def test_the_curve_and_the_weights_are_those_of_one_process(
    name: str, sharded: Path, model: str, pairs: str, tmp_path: Path
) -> None:
    """Losses agree to 1e-4, gradient norms to 1e-3: what float32 sums in another order leave."""
    train(pairs, model, tmp_path / "one", **RUNS[name])
    for a, b in zip(curve(tmp_path / "one"), curve(sharded / name), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    file = UNET if name == "full" else LORA
    one, two = load_file(tmp_path / "one" / file), load_file(sharded / name / file)
    assert one.keys() == two.keys()
    for key, value in one.items():
        # an Adam step on a gradient of nearly 0 may point either way: at most twice the learning rate a step
        assert two[key].shape == value.shape
        assert (two[key] - value).abs().mean() < 0.05 * RUNS[name].get("learning_rate", 1e-2)


def test_stock_diffusers_loads_what_is_exported(sharded: Path, model: str) -> None:
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    unet = StableDiffusionPipeline.from_pretrained(sharded / "full").unet
    assert type(unet) is UNet2DConditionModel
    start = StableDiffusionPipeline.from_pretrained(model)
    assert any(not torch.equal(p, start.unet.get_parameter(name)) for name, p in unet.named_parameters())
    start.load_lora_weights(str(sharded / "lora"))
    assert (sharded / "lora" / "before_after.png").is_file()


def test_two_and_two_steps_are_four_to_the_bit(sharded: Path) -> None:
    """Weights, their moving average and the optimizer's moments, after a resume in another life of the network."""
    for name in ("weights", "state"):
        file = f"checkpoints/step-00000004/{name}.safetensors"
        straight, halves = load_file(sharded / "full" / file), load_file(sharded / "halves" / file)
        assert straight.keys() == halves.keys()
        assert all(torch.equal(value, halves[key]) for key, value in straight.items())


def test_a_checkpoint_of_shards_continues_in_one_process(sharded: Path, model: str, pairs: str, tmp_path: Path) -> None:
    step = str(sharded / "full" / "checkpoints" / "step-00000002")
    changes = {**RUNS["full"], "checkpointing_steps": 0, "resume_from_checkpoint": step, "max_train_steps": 3}
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "config.yaml").write_text((sharded / "full" / "config.yaml").read_text())
    train(pairs, model, tmp_path / "alone", **changes)
    (line,) = curve(tmp_path / "alone")
    assert line["loss"] == pytest.approx(curve(sharded / "full")[2]["loss"], rel=1e-4)


def test_a_loss_that_is_not_finite_stops_all_processes(sharded: Path) -> None:
    for rank in range(2):
        message = json.loads((sharded / f"{rank}.json").read_text())["ruined"]
        assert "the loss of step 2 is not finite; examples: " in message
    assert (sharded / "ruined" / "checkpoints" / "step-00000001").is_dir()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("ddpo", "'ddpo' samples while it trains"),
        ("pinned", "--pinned_draws lets each process skip passes"),
        ("adafactor", "needs weights whole"),
        ("fp16", "choose bf16"),
    ],
)
def test_what_cannot_be_sharded_is_refused_before_anything_is_written(name: str, reason: str, sharded: Path) -> None:
    for rank in range(2):
        assert reason in json.loads((sharded / f"{rank}.json").read_text())[name]
    assert not (sharded / name).exists()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "DeepSpeed, which is not supported: pass --use_fsdp --fsdp_version 2"),
        # as --use_fsdp alone sets them
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1", "FSDP_SYNC_MODULE_STATES": "true"},
            "FSDP1, which is not supported",
        ),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params"),
        (
            {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_ACTIVATION_CHECKPOINTING": "true"},
            "use --gradient_checkpointing true",
        ),
    ],
)
def test_other_ways_to_shard_are_refused_in_one_line(
    variables: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message) as error:
        Processes(may_shard=True)
    assert "\n" not in str(error.value)


def test_programs_that_do_not_train_refuse_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP, which is for training"):
        Processes()
