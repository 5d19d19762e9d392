"""Runs whose reference is their own past: a run that died goes on as if it had not."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import diffalign
from diffalign.errors import UserError
from diffalign.strategies.base import Context, Strategy
from diffalign.strategies.registry import get_method
from diffalign.training.checkpoint import list_checkpoints, read_checkpoint
from tests.factories import save_tiny

OWN = {
    "seppo": {"checkpoint_steps": 2, "rollout_steps": 2, "beta": 100.0},
    "dro": {"sampler_steps": 2, "rollout_steps": 2},
}


class Killed(BaseException):
    """What no handler catches, as a killed process leaves its run."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_tiny("sd", tmp_path_factory.mktemp("model")))


@pytest.fixture(scope="module")
def winners(tmp_path_factory: pytest.TempPathFactory) -> str:
    from PIL import Image

    folder, rng = tmp_path_factory.mktemp("winners"), np.random.default_rng(0)
    rows = []
    for index in range(5):
        Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / f"{index}.png")
        rows.append({"id": str(index), "prompt": f"a {index}", "images": [f"{index}.png"]})
    (folder / "winners.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "winners.jsonl")


def train(method: str, data: str, model: str, folder: Path, **changes: Any) -> Any:
    options = {
        "pretrained_model_name_or_path": model, "output_dir": str(folder), "rank": 2, "train_batch_size": 2,
        "max_train_steps": 7, "learning_rate": 1e-2, "checkpointing_steps": 3, "num_validation_images": 0,
        **OWN[method], **changes,
    }  # fmt: skip
    return diffalign.train(data, method=method, console=Console(file=io.StringIO()), **options)


def last_state(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = read_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    assert checkpoint.step == 7
    return {**checkpoint.weights, **load_file(checkpoint.folder / "state.safetensors")}


@pytest.mark.parametrize("method", OWN)
def test_a_run_that_died_goes_on_with_the_same_past(
    method: str, model: str, winners: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(method, winners, model, tmp_path / "straight")

    def die(self: Strategy, ctx: Context) -> None:
        if ctx.step == 5:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(get_method(method).strategy, "after_step", die)
        with pytest.raises(Killed):
            train(method, winners, model, tmp_path / "died")
    train(method, winners, model, tmp_path / "died", resume_from_checkpoint="latest")
    expected, got = last_state(tmp_path / "straight"), last_state(tmp_path / "died")
    assert expected.keys() == got.keys()
    assert any("strategy" in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(value, got[name]), name


def test_cached_reference_values_are_refused(model: str, winners: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="the reference of 'seppo' moves"):
        train("seppo", winners, model, tmp_path / "run", pinned_draws=1)
