"""Networks run on an accelerator where there is one, or where ``--device`` says."""

from __future__ import annotations

import inspect
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import diffalign.device
from diffalign.cli.main import main
from diffalign.device import choose_device
from diffalign.errors import UserError

EVAL = Path(__file__).resolve().parents[1] / "eval"


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"), [(True, True, "cuda"), (False, True, "mps"), (False, False, "cpu")]
)
def test_auto_is_the_first_accelerator(monkeypatch: pytest.MonkeyPatch, cuda: bool, mps: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert choose_device() == choose_device("auto") == expected
    assert choose_device("cpu") == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_here_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=rf"--device {name} cannot be used here \(.*\); choose auto, cpu"):
        choose_device(name)


def test_every_script_with_networks_asks_for_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    asked: list[str] = []
    monkeypatch.setattr(diffalign.device, "choose_device", lambda name="auto": asked.append(name) or "cpu")
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    (tmp_path / "0.txt").write_text("a photo of a star")
    words = [str(tmp_path), "--rewards", "incompressibility"]
    assert main(["score", *words]) == main(["score", *words, "--device", "cuda"]) == 0
    assert asked == ["auto", "cuda"]
    for name in ("dpg", "evaluate", "geneval", "hps_benchmark", "partiprompts", "self_check", "t2i_compbench",
                 "unigenbench", "winrate"):  # fmt: skip
        entry: Any = runpy.run_path(str(EVAL / f"{name}.py"))[name]
        assert inspect.signature(entry).parameters["device"].default == "auto", name
    winrate: Any = runpy.run_path(str(EVAL / "winrate.py"))["winrate"]
    assert winrate(tmp_path, tmp_path, "incompressibility") == 0
    assert asked == ["auto", "cuda", "auto"]


def test_an_evaluation_draws_and_judges_where_it_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--models", "[base=tiny-sd]", "--output", str(tmp_path / "out"), "--device", "cuda:99"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *words])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(str(EVAL / "evaluate.py"), run_name="__main__")
    assert "--device cuda:99 cannot be used here" in capsys.readouterr().err
