"""Mistakes are noticed before the data set is encoded, most of them before the model is loaded."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console
from safetensors import safe_open

import diffalign
from diffalign.errors import UserError
from diffalign.training.checkpoint import list_checkpoints
from diffalign.training.image_domain import ImageDomain
from tests.training.runs import LORA, options, train


class Reached(Exception):
    """A run came further than it should have."""


@pytest.fixture
def forbid(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """``forbid("load_policy")``: what a run must not come to."""

    def arrange(step: str) -> None:
        def reached(*_: Any, **__: Any) -> None:
            raise Reached(step)

        monkeypatch.setattr(ImageDomain, step, reached)

    return arrange


@pytest.fixture(scope="module")
def done(model: str, pairs: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a finished run."""
    result, _ = train(pairs, model, tmp_path_factory.mktemp("done") / "run", max_train_steps=1, num_validation_images=0)
    return result.folder


WATCH = {"validation_steps": 1, "validation_prompts": ["a 1"]}
BEFORE_THE_MODEL: dict[str, tuple[dict[str, Any], str]] = {
    "no wandb": ({"report_to": ["wandb"]}, "pip install wandb"),
    "no bitsandbytes": ({"optimizer": "adamw8bit"}, r"pip install 'diffalign\[quant\]'"),
    "a watched reward that does not exist": ({**WATCH, "early_stop_reward": "pickscor"}, "did you mean 'pickscore'"),
    "a watched reward without weights": ({**WATCH, "early_stop_reward": "clip@/no/where"}, "/no/where"),
    "a watched reward with nothing to judge": (
        {"validation_steps": 1, "early_stop_reward": "incompressibility"},
        "no captions to judge but those that are trained on: name others by --validation_prompts",
    ),
    "a file of captions that is not there": ({"validation_prompts": ["gone.txt"]}, "there is no prompt file gone.txt"),
    "more held-out captions than there are": ({"held_out_prompts": 5}, "leaves nothing to train on: .* has 5 captions"),
    "a reward that does not exist": ({"method": "ddpo", "rewards": "pickscor"}, "did you mean 'pickscore'"),
    "a device that is not there": (
        {"method": "ddpo", "rewards": "pickscore", "reward_device": "gpu"},
        r"--reward_device gpu cannot be used here .*; choose same, cpu, cuda, cuda:N or mps",
    ),
    "a type that does not exist": (
        {"method": "ddpo", "rewards": "pickscore", "reward_dtype": "half"},
        "'reward_dtype' is 'half', .* must be one of 'float32', 'bfloat16', 'float16' or None",
    ),
    "a reward without gradient": ({"method": "refl", "rewards": "incompressibility"}, "has no gradient"),
    "a reward that reads what is not there": ({"method": "ddpo", "rewards": "verifier"}, "a column 'metadata'"),
    "pairs without scores": ({"method": "smpo"}, "needs a score of both images of a pair, yet '0' .5 of 5 pairs."),
    "captions without labels": ({"method": "d3po", "labelled": True}, "holds no labels"),
    "a column that is not there": ({"column_map": {"prompt": "caption"}}, "no column 'caption'"),
}


@pytest.mark.parametrize("mistake", BEFORE_THE_MODEL)
def test_noticed_before_the_model_is_loaded(
    forbid, model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mistake: str
) -> None:
    for package in ("wandb", "bitsandbytes"):
        monkeypatch.setitem(sys.modules, package, None)
    forbid("load_policy")
    changes, message = BEFORE_THE_MODEL[mistake]
    with pytest.raises(UserError, match=message):
        train(pairs, model, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


RESUMED: dict[str, tuple[dict[str, Any], str]] = {
    "method": ({"method": "mapo"}, "cannot be continued with 'mapo'"),
    "model": ({"pretrained_model_name_or_path": "tiny-sd"}, "this run's is 'tiny-sd'"),
    "train mode": ({"train_mode": "full"}, "its train mode is 'lora', this run's is 'full'"),
    "global batch": ({"global_batch_pairs": 2}, "its global batch is 4, this run's is 2"),
    "pinned draws": ({"pinned_draws": 1}, "its pinned draws is False, this run's is True"),
    "no checkpoint": ({"resume_from_checkpoint": "elsewhere"}, "no checkpoint folder elsewhere"),
}


@pytest.mark.parametrize("what", RESUMED)
def test_another_run_is_refused_before_the_model_is_loaded(
    forbid, model: str, pairs: str, done: Path, what: str
) -> None:
    forbid("load_policy")
    changes, message = RESUMED[what]
    with pytest.raises(UserError, match=message):
        train(pairs, model, done, **{"resume_from_checkpoint": "latest", **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"rank": 4}, "its rank is 2, this run's is 4"), ({"lora_targets": ["to_q"]}, "this run's is 'to_q'")],
)
def test_another_adapter_is_refused_before_anything_is_encoded(
    forbid, model: str, pairs: str, done: Path, changes: dict[str, Any], message: str
) -> None:
    forbid("prepare_data")
    with pytest.raises(UserError, match=message):
        train(pairs, model, done, resume_from_checkpoint="latest", **changes)


def test_a_checkpoint_that_says_less_is_continued(model: str, pairs: str, tmp_path: Path) -> None:
    """Runs that were begun before a field of the identity existed go on."""
    from diffalign.training.checkpoint import refuse_other_run

    result, _ = train(pairs, model, tmp_path / "run", max_train_steps=1, num_validation_images=0)
    checkpoints = result.folder / "checkpoints"
    state = list_checkpoints(checkpoints)[-1] / "state.json"
    tree = json.loads(state.read_text())
    del tree["identity"]["global_batch"]
    padded = json.dumps(tree)
    state.write_text(padded + " " * (state.stat().st_size - len(padded)))  # sizes are compared, contents later
    refuse_other_run("latest", checkpoints, {"global_batch": 7, "rank": 2})
    with pytest.raises(UserError, match="its rank is 2, this run's is 3"):
        refuse_other_run("latest", checkpoints, {"global_batch": 7, "rank": 3})


def test_a_cache_that_cannot_be_made_is_one_message(model: str, pairs: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the cache .* change --cache_dir"):
        train(pairs, model, tmp_path / "run", cache_dir=str(tmp_path / "file"))


def test_an_adapter_that_is_continued_keeps_its_shape(model: str, pairs: str, done: Path, tmp_path: Path) -> None:
    """All that is written about the run says so, whatever ``--rank`` is."""
    brief = {"max_train_steps": 1, "num_validation_images": 0}
    result, said = train(pairs, model, tmp_path / "run", start_adapter=str(done), rank=16, **brief)
    assert f"continues from the adapter {done} (rank 2)" in said
    assert "| rank | 2 |" in (result.folder / "README.md").read_text()
    recorded = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert (recorded["rank"], recorded["lora_alpha"]) == (2, 2)
    with safe_open(result.folder / LORA, "pt") as file:
        assert file.metadata()["rank"] == "2"
        assert json.loads(file.metadata()["lora_adapter_metadata"])["unet.r"] == 2
    train(pairs, model, result.folder, start_adapter=str(done), resume_from_checkpoint="latest", **brief)


def test_the_header_names_model_preset_and_rate(model: str, pairs: str, tmp_path: Path) -> None:
    _, said = train(pairs, model, tmp_path / "run", dry_run=True)
    assert f"model {model}; no preset: options that are not given have the package's defaults" in said
    assert "(the default of every method" not in said  # an option has chosen the rate

    given = {k: v for k, v in options(model, tmp_path / "run", dry_run=True).items() if k != "learning_rate"}
    for changes, expected in (
        ({}, "learning rate 1e-05 (the default of every method"),
        ({"train_mode": "full"}, "learning rate 1e-05\n"),
        ({"preset": "tiny-sd"}, "learning rate 0.0003\n"),
    ):
        console = Console(file=io.StringIO(), width=200)
        diffalign.train(pairs, method="diffusion_dpo", console=console, **{**given, **changes})
        said = console.file.getvalue()  # type: ignore[attr-defined]
        assert expected in said
        assert ("preset tiny-sd\n" in said) == ("preset" in changes)
