"""Whole runs of methods that follow a reward's gradient, on a tiny pipeline: reward by name, captions from a file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import diffalign
from diffalign.bundled import bundled_path
from diffalign.errors import UserError
from diffalign.rewards.pickscore import PickScore
from diffalign.training.trackers import METRICS_FILE
from tests.factories import save_tiny

LORA = "pytorch_lora_weights.safetensors"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("world")
    (folder / "captions.txt").write_text("a red cube\na cat\ntwo birds\n")
    return {
        "pretrained_model_name_or_path": str(save_tiny("sd", folder / "sd")),
        "prompts": str(folder / "captions.txt"),
    }


def run(world: dict[str, Any], method: str, folder: Path, **changes: Any) -> Any:
    options = {
        **world,
        "rewards": "tiny-pickscore",
        "rollout_steps": 4,
        "output_dir": str(folder),
        "rank": 2,
        "train_batch_size": 2,
        "max_train_steps": 2,
        "learning_rate": 1e-3,
        "num_inference_steps": 2,
        "num_validation_images": 1,
    }
    return diffalign.train(method=method, **{**options, **changes})


def redness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
    return images[:, 0].mean(dim=(1, 2))


@pytest.mark.parametrize("method", ["alignprop", "draft_k", "draft_lv", "refl"])
def test_a_run_learns_from_its_own_samples(world: dict[str, str], method: str, tmp_path: Path) -> None:
    result = run(world, method, tmp_path / "run")
    lines = [json.loads(line) for line in (result.folder / METRICS_FILE).read_text().splitlines()]
    rows = [line for line in lines if "loss" in line]  # the last one holds the drift of the samples
    assert len(rows) == 2
    assert all(abs(row["reward"]) < 100 and row["grad_norm"] > 0 for row in rows)
    weights = load_file(result.folder / LORA)
    assert any(value.abs().max() > 0 for name, value in weights.items() if "lora_B" in name)


def test_a_resumed_run_ends_with_the_same_weights(world: dict[str, str], tmp_path: Path) -> None:
    whole = run(world, "alignprop", tmp_path / "whole", max_train_steps=4)
    run(world, "alignprop", tmp_path / "parts", max_train_steps=4, checkpointing_steps=2)
    for late in (tmp_path / "parts" / "checkpoints").glob("step-*4"):
        for file in late.iterdir():
            file.unlink()
        late.rmdir()
    parts = run(
        world,
        "alignprop",
        tmp_path / "parts",
        max_train_steps=4,
        checkpointing_steps=2,
        resume_from_checkpoint="latest",
    )
    first, second = (load_file(result.folder / LORA) for result in (whole, parts))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_rewards_and_callbacks_that_only_python_can_give(world: dict[str, str], tmp_path: Path) -> None:
    told: list[int] = []
    options = {**world, "prompts": None}
    red = diffalign.FunctionReward(redness, "redness", differentiable=True)

    def train(**changes: Any) -> Any:
        return run(options, "draft_k", tmp_path / "run", dataset=["a red cube", "a cat"], **changes)

    result = train(rewards={"redness": (red, 0.5), "tiny-pickscore": 0.1}, callback=lambda step, _: told.append(step))
    assert sorted(set(told)) == [1, 2]
    recorded = yaml.safe_load((result.folder / "config.yaml").read_text())["rewards"]
    assert recorded == f"redness@(python {__name__}.redness):0.5,tiny-pickscore:0.1"
    assert {"reward", "loss"} <= result.metrics.keys()
    assert yaml.safe_load((result.folder / "config.yaml").read_text())["guidance_scale"] == 7.5  # diffusers' for SD1.x
    with pytest.raises(UserError, match=r"'redness' was a Python object.*rewards=\{'redness'"):
        train(rewards=recorded, resume_from_checkpoint="latest")


def test_a_reward_without_gradient_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no gradient"):
        run(world, "draft_k", tmp_path / "run", rewards="incompressibility")


def test_a_reward_whose_scale_moves_is_refused_where_its_gradient_is_followed(
    world: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "rewards.yaml").write_text("- {name: tiny-pickscore, normalise: true}\n")
    with pytest.raises(UserError, match="follows the gradient of tiny-pickscore, which 'normalise' changes"):
        run(world, "draft_k", tmp_path / "run", rewards=str(tmp_path / "rewards.yaml"))


def test_networks_of_all_rewards_are_what_and_where_they_are_told(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that are trained on, that watch, and that judge the bundled world's captions."""
    loaded: list[tuple[str, torch.device, torch.dtype]] = []
    load = PickScore.load

    def seen(weights: str, *, device: torch.device, dtype: torch.dtype) -> PickScore:
        loaded.append((weights, device, dtype))
        return load(weights, device=device, dtype=dtype)

    monkeypatch.setattr(PickScore, "load", seen)
    (copied := tmp_path / "judge").symlink_to(bundled_path("tiny-pickscore"))
    few = {"prompts": None, "max_train_samples": 2, "max_train_steps": 1, "evaluation_prompts": 2}
    watch = {"early_stop_reward": f"pickscore@{copied}", "validation_steps": 1}
    told = {"reward_dtype": "bfloat16", "reward_device": "cpu"}
    result = run(world, "refl", tmp_path / "run", **few, **watch, **told)
    assert [place for _, *place in loaded] == [[torch.device("cpu"), torch.bfloat16]] * 3
    assert result.metrics["grad_norm"] > 0
    assert yaml.safe_load((result.folder / "config.yaml").read_text())["reward_dtype"] == "bfloat16"
