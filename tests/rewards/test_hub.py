"""Scorers that cannot be loaded: which model, from where, what is lacking, what to do."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub.constants
import pytest
from PIL import Image

from diffalign.bundled import bundled_path
from diffalign.cli.main import main
from diffalign.errors import UserError
from diffalign.evaluation.geneval.colors import ClipColors
from diffalign.rewards.hub import pretrained
from diffalign.rewards.loading import load_reward
from diffalign.rewards.pickscore import PickScore


@pytest.fixture(autouse=True)
def no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a connection nor anything downloaded before."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "nothing-cached"))


@pytest.mark.parametrize(
    ("reward", "model"),
    [
        ("pickscore", "yuvalkirstain/PickScore_v1"),
        ("clip", "openai/clip-vit-large-patch14"),
        ("clip@m", "m"),
        ("pickscore@owner/nope", "owner/nope"),
    ],
)
def test_a_model_that_is_neither_here_nor_on_the_hub(reward: str, model: str) -> None:
    with pytest.raises(UserError, match=f"CLIP model {model}: there is no such folder.*hf download {model}"):
        load_reward(reward)


def test_the_official_colours_of_geneval() -> None:
    with pytest.raises(UserError, match="CLIP model openai/clip-vit-large-patch14: there is no such folder"):
        ClipColors.load()


def test_a_path_is_not_taken_for_a_name_on_the_hub(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no such folder; name a folder, or USER/REPOSITORY") as refusal:
        PickScore.load(str(tmp_path / "absent"))
    assert "hf download" not in str(refusal.value)


def test_a_bundled_model_of_another_kind() -> None:
    with pytest.raises(UserError, match=r"CLIP model from the folder .*tiny-sd: .*model\.safetensors"):
        PickScore.load("tiny-sd")


def test_an_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"from the folder .*model\.safetensors.*name a folder that holds all of it"):
        load_reward(f"pickscore@{tmp_path}")


@pytest.mark.parametrize("absent", ["tokenizer.json", "preprocessor_config.json"])
def test_a_folder_that_lacks_a_part(tmp_path: Path, absent: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bundled_path("tiny-pickscore"), folder, ignore=shutil.ignore_patterns(absent))
    with pytest.raises(UserError, match=f"image processor and tokenizer from the folder .*{absent}"):
        PickScore.load(str(folder))


def test_weights_cut_short(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(bundled_path("tiny-pickscore"), folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot load the CLIP model from the folder"):
        PickScore.load(str(folder))


def test_a_cached_model_of_another_shape_is_not_blamed_on_the_hub() -> None:
    with pytest.raises(UserError, match=r"^cannot load the model a/b: sizes differ$"), pretrained("the model", "a/b"):
        raise RuntimeError("sizes differ.\nmore")


def test_the_command_says_it_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (32, 32)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a red circle\n")
    assert main(["score", str(tmp_path), "--rewards", "pickscore"]) == 2
    told = capsys.readouterr().err
    assert "error: cannot load the CLIP model yuvalkirstain/PickScore_v1" in told
    assert "Traceback" not in told
