"""ReNO in the loop is the search of the Python call; it resumes, and leaves images instead of weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import diffalign
from diffalign.errors import UserError
from diffalign.strategies.base import Context
from diffalign.strategies.reno import ReNO, ReNOConfig
from diffalign.training.processes import Processes
from diffalign.training.trackers import METRICS_FILE
from diffalign.training.update import GradientPass
from tests.battery.methods import CountingPolicy, batch_for
from tests.factories import Ripples, save_tiny, tiny_policy

CAPTIONS = ["a red cube", "a cat", "two birds", "a b"]
ITERATIONS = 4


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("world")
    (folder / "captions.txt").write_text("\n".join(CAPTIONS) + "\n")
    return {
        "pretrained_model_name_or_path": str(save_tiny("sd", folder / "sd")),
        "prompts": str(folder / "captions.txt"),
    }


def run(world: dict[str, str], folder: Path, **changes: Any) -> Any:
    options = {
        **world,
        "rewards": "tiny-pickscore:0.5",
        "iterations": ITERATIONS,
        "rollout_steps": 2,
        "optimizer": "sgd",
        "sgd_momentum": 0.9,
        "learning_rate": 5.0,
        "lr_scheduler": "constant",
        "max_grad_norm": 0.1,
        "train_batch_size": 2,
        "num_train_epochs": 1,
        "num_validation_images": 0,
        "output_dir": str(folder),
    }
    return diffalign.train(method="reno", **{**options, **changes})


def results(folder: Path) -> dict[str, dict[str, Any]]:
    found = {}
    for file in sorted((folder / "images").glob("*.json")):
        record = json.loads(file.read_text())
        noise = load_file(file.with_suffix(".safetensors"))["noise"]
        assert file.with_suffix(".png").is_file()
        found[record["prompt"]] = {**record, "noise": noise}
    return found


@pytest.mark.parametrize(
    "changes",
    [{}, {"max_rows_per_forward": 1}, {"train_batch_size": 1, "global_batch_pairs": 2}, {"resolution": 32}],
)
def test_the_loop_makes_the_search_of_the_python_call(
    world: dict[str, str], tmp_path: Path, changes: dict[str, Any]
) -> None:
    result = run(world, tmp_path / "run", **changes)
    assert result.steps == 2 * ITERATIONS
    assert not (result.folder / "pytorch_lora_weights.safetensors").exists()
    found = results(result.folder)
    assert found.keys() == set(CAPTIONS)
    side = changes.get("resolution", 16)
    assert {tuple(record["noise"].shape) for record in found.values()} == {(4, side // 2, side // 2)}
    called = diffalign.optimize_noise(
        world["pretrained_model_name_or_path"],
        list(found),
        "tiny-pickscore:0.5",
        steps=ITERATIONS,
        num_inference_steps=2,
        height=changes.get("resolution"),
        width=changes.get("resolution"),
        seed=[record["seed"] for record in found.values()],
        device="cpu",
    )
    for expected in called:
        got = found[expected.prompt]
        assert got["history"]["total"] == pytest.approx(expected.history["total"], rel=1e-4)
        assert got["iteration"] == expected.iteration
        torch.testing.assert_close(got["noise"], expected.noise, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("max_rows", "passes"), [(0, 1), (1, 3)])
def test_number_of_denoiser_calls(max_rows: int, passes: int) -> None:
    """A live step is computed once more in backward; where captions take several passes, all are made once before."""
    policy, steps = CountingPolicy(), 2
    expected = {"trained": 2 * steps * passes, **({"policy": steps * passes} if passes > 1 else {})}
    ctx = Context(policy, rewards={"ripples": Ripples()}, global_batch=3, max_rows=max_rows)
    strategy = ReNO(ReNOConfig(iterations=2, rollout_steps=steps))
    strategy.build(ctx)
    parameters = [noise for group in strategy.parameters() for noise in group.parameters]
    updates = strategy.collect(ctx, [batch_for("alignprop", policy, examples=3)])
    for _ in range(2):
        update = next(updates)
        policy.calls.clear()
        GradientPass(strategy, ctx, parameters, Processes())(update)
        assert policy.calls == expected


def test_a_resumed_run_finds_the_same(world: dict[str, str], tmp_path: Path) -> None:
    whole = results(run(world, tmp_path / "whole").folder)
    run(world, tmp_path / "parts", max_train_steps=ITERATIONS)
    shutil.rmtree(tmp_path / "parts" / "images")
    parts = run(world, tmp_path / "parts", max_train_steps=2 * ITERATIONS, resume_from_checkpoint="latest").folder
    again = results(parts)
    assert again.keys() == whole.keys()
    for prompt, record in whole.items():
        assert again[prompt]["history"] == record["history"]
        assert torch.equal(again[prompt]["noise"], record["noise"])
    rows = [json.loads(line) for line in (parts / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 2 * ITERATIONS + 1))


def test_mistakes_are_refused() -> None:
    with pytest.raises(UserError, match="one process"):
        ReNO(ReNOConfig()).build(Context(tiny_policy("sd"), world_size=2))
    with pytest.raises(UserError, match="iterations"):
        ReNOConfig(iterations=0)
    with pytest.raises(UserError, match="--use_ema averages the model's weights, which 'reno' does not train"):
        diffalign.train([], method="reno", rewards="tiny-pickscore", use_ema=True)
    with pytest.raises(ValueError, match="checkpoint"):
        ReNO(ReNOConfig()).load_state_dict({"noise": 1})
