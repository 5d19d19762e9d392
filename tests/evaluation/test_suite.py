"""Several models in one command."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.errors import UserError
from diffalign.evaluation.suite import parse_models
from diffalign.records import read_json
from tests.factories import save_tiny


def test_three_models_on_captions_of_the_bundled_world(script, refused, tmp_path: Path) -> None:
    model = save_tiny("sd", tmp_path / "model")
    output = tmp_path / "out"
    models = f"[base={model}, again={model}, third={model}]"
    words = ("--models", models, "--limit", "3", "--steps", "1", "--rewards", "verifier,incompressibility")
    answer = script("evaluate", *words, "--output", output)
    assert answer.status == 0, answer.err
    table = (output / "summary.md").read_text()
    assert answer.out == f"{table}{output / 'report.html'}\n"
    head, _, base, again, third = table.splitlines()
    assert "geneval-like" in head
    assert base.startswith("| base | ")
    assert third.replace("third", "again") == again
    assert "all 3 tied" in again, "a model ties with itself"
    rates = read_json(output / "winrates.json")
    assert rates["base"] == {}
    assert rates["again"]["incompressibility"]["ties"] == 3
    assert "## Win rates by geneval" in (output / "report.md").read_text()
    for name in ("base", "again", "third"):
        assert (output / name / "geneval" / "results.jsonl").is_file()
        scores = read_json(output / name / "scores.manifest.json")
        assert scores["generation"]["prompts"]["used"] == 3

    plain = tmp_path / "captions.txt"
    plain.write_text("a cat\na dog\n")
    few = ("--models", f"[base={model}]", "--prompts", plain, "--rewards", "incompressibility", "--steps", "1")
    answer = script("evaluate", *few, "--output", tmp_path / "plain", "--report", "false")
    assert answer.status == 0, answer.err
    assert not list((tmp_path / "plain").glob("report*"))
    assert "geneval" not in answer.out
    assert "was begun with other settings" in refused("evaluate", *few, "--output", tmp_path / "plain", "--steps", "2")


def test_models_have_names() -> None:
    assert parse_models(["base=tiny-sd", "x=runs/a=b"]) == {"base": "tiny-sd", "x": "runs/a=b"}
    with pytest.raises(UserError, match="expected NAME=MODEL"):
        parse_models(["tiny-sd"])
    with pytest.raises(UserError, match="two models are called 'a'"):
        parse_models(["a=x", "a=y"])
