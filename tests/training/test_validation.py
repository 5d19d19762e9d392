"""Looking at a model while it trains: what is drawn, and how it is measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from diffalign.evaluation.evaluator import ImageEvaluator
from diffalign.policies.saving import read_lora_metadata
from tests.training.runs import LORA, train


def test_a_run_is_looked_at_in_its_own_resolution(
    model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[tuple[int, ...]] = []
    score = ImageEvaluator.score

    def seen(evaluator: ImageEvaluator, images: Tensor) -> Any:
        judged.append(tuple(images.shape[-2:]))
        return score(evaluator, images)

    monkeypatch.setattr(ImageEvaluator, "score", seen)
    watch = {"early_stop_reward": "incompressibility", "validation_prompts": ["a 1"], "validation_steps": 1}
    result, _ = train(pairs, model, tmp_path / "run", resolution=32, max_train_steps=1, **watch)  # the model's own: 16
    assert set(judged) == {(32, 32)}
    for step in (0, 1):
        with Image.open(result.folder / "validation" / f"step-{step:08d}.png") as grid:
            assert grid.size == (32, 32)
    with safe_open(result.folder / "validation" / "start.safetensors", "pt") as start:
        assert start.get_slice("latents").get_shape() == [1, 4, 16, 16]
        assert start.metadata()["probe"].endswith("[32, 32]]")
    assert result.summary["samples"]["drift/prediction"] > 0
    assert result.summary["settings"]["resolution"] == [32, 32]
    assert read_lora_metadata(result.folder / LORA)["resolution"] == "32x32"


def test_without_a_resolution_it_is_the_models(model: str, pairs: str, tmp_path: Path) -> None:
    result, _ = train(pairs, model, tmp_path / "run", max_train_steps=1)
    with Image.open(result.folder / "validation" / "step-00000001.png") as grid:
        assert grid.size == (16, 16)
    assert read_lora_metadata(result.folder / LORA)["resolution"] == "16x16"
