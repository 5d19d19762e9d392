"""From the script that samples for people to a run on their labels: the same images again, or a refusal."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rollouts import labelled, rollout
from diffalign.rollouts.trajectory import Trajectories, roll_out
from tests.factories import save_tiny
from tests.training.runs import train
from train_scripts import sample_for_labels

ALIKE = {"images_per_prompt": 2, "rollout_steps": 2, "rollout_guidance_scale": 3.0}
OPTIONS: list[dict[str, Any]] = [
    {},
    {"resolution": 32},
    {"mixed_precision": "bf16"},
    {"mixed_precision": "bf16", "train_mode": "full"},
]


def label(folder: Path, model: str, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """Sample images of two captions by the script, and judge them."""
    given = {"pretrained_model_name_or_path": model, "output_dir": folder, "device": "cpu", **ALIKE, **options}
    folder.mkdir()
    (folder / "captions.txt").write_text("a b\na c\n")
    words = [f"--{name}={value}" for name, value in given.items()]
    monkeypatch.setattr(sys, "argv", ["sample_for_labels", f"--prompts={folder / 'captions.txt'}", *words])
    assert sample_for_labels.main() == 0
    rows = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    return write(folder / "labels.jsonl", [{**row, "scores": [0.0, -1.0]} for row in rows])


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learn(labels: Path, model: str, folder: Path, **changes: Any) -> str:
    """Run on labels and return what was said."""
    options = {
        "prompts": str(labels), "labelled": True, "updates_per_rollout": 1, "max_train_steps": 1,
        "global_batch_pairs": 2, "num_validation_images": 0, **ALIKE, **changes,
    }  # fmt: skip
    _, said = train(None, model, folder, method="d3po", **options)  # type: ignore[arg-type]
    return str(said)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_the_run_samples_the_images_that_were_labelled(
    options: dict[str, Any], model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Tensor] = []

    def watched(*arguments: Any, **keywords: Any) -> Trajectories:
        made = roll_out(*arguments, **keywords)
        found.append(made.final)
        return made

    for module in (labelled, rollout):
        monkeypatch.setattr(module, "roll_out", watched)
    labels = label(tmp_path / "round", model, monkeypatch, **options)
    shown = torch.cat(found)
    found.clear()
    learn(labels, model, tmp_path / "run", rollout_batch_size=2, **options)
    apart = (torch.cat(found)[None] - shown[:, None]).flatten(2).abs().amax(2)  # captions come in another order
    assert sorted(apart.argmin(1).tolist()) == list(range(4))
    assert apart.amin(1).max() < 1e-4


@pytest.fixture(scope="module")
def rounds(model: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Labels of images that the bare model sampled, and an adapter of it; the adapter itself."""
    folder = tmp_path_factory.mktemp("rounds")
    with pytest.MonkeyPatch.context() as monkeypatch:
        bare = label(folder / "bare", model, monkeypatch)
        learn(bare, model, folder / "run")
        return {
            "bare": bare,
            "adapter": label(folder / "next", model, monkeypatch, adapter=folder / "run"),
            "run": folder / "run",
        }


@pytest.mark.parametrize(
    ("labels", "changes", "message"),
    [
        ("bare", {"resolution": 32}, r"sampled at 16x16 pixels .*this run samples at 32x32: set --resolution 16"),
        (
            "bare",
            {"mixed_precision": "bf16"},
            "sampled in float32, this run samples in bfloat16: set --mixed_precision",
        ),
        ("bare", {"start_adapter": "run"}, "sampled without an adapter, this run starts from one"),
        ("adapter", {}, r"with an adapter \(\w+\), this run starts without one: name theirs with --start_adapter"),
        ("bare", {"model": "other"}, "by another model than this run starts from: set --pretrained_model_name_or_path"),
    ],
)
def test_another_model_size_or_precision_is_refused_before_the_first_step(
    labels: str, changes: dict[str, Any], message: str, rounds: dict[str, Path], model: str, tmp_path: Path
) -> None:
    changes = dict(changes)
    if "start_adapter" in changes:
        changes["start_adapter"] = str(rounds["run"])
    named = str(save_tiny("sd", tmp_path / "other", seed=1)) if changes.pop("model", None) else model
    with pytest.raises(UserError, match=f"the labels of row '0' belong to images .*{message}"):
        learn(rounds[labels], named, tmp_path / "run", dry_run=True, **changes)


def test_the_next_round_starts_from_its_adapter(rounds: dict[str, Path], model: str, tmp_path: Path) -> None:
    said = learn(rounds["adapter"], model, tmp_path / "run", dry_run=True, start_adapter=str(rounds["run"]))
    assert "does not say which model" not in said


def test_labels_without_a_record_are_taken_with_a_note(rounds: dict[str, Path], model: str, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in rounds["bare"].read_text().splitlines()]
    for name in ("size", "precision", "adapter", "model", "encoders"):
        del rows[1]["metadata"]["rollout"][name]
    old = write(rounds["bare"].with_name("old.jsonl"), rows)
    said = " ".join(learn(old, model, tmp_path / "run", dry_run=True).split())
    assert "note: row '1', as those of earlier versions, does not say which model sampled its images" in said
