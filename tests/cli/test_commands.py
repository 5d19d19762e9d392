"""The commands that look at things: methods, doctor, data check."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest

import diffalign
from diffalign.cli import doctor, methods
from diffalign.strategies.registry import list_methods
from tests.data.support import encoded, write_images, write_jsonl

NAMES = [method.name for method in list_methods()]


def test_help_and_version(cli) -> None:
    answer = cli("--help")
    assert answer.status == 0
    assert all(name in answer.out for name in ("train", "train-text", "methods", "data", "doctor"))
    assert cli("--version").out == f"diffalign {diffalign.__version__}\n"


def test_methods_as_a_table(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    answer = cli("methods")
    assert answer.status == 0
    assert all(f" {name} " in answer.out for name in NAMES)
    assert "paper" in answer.out


def test_methods_on_a_narrow_terminal_keep_their_names(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "70")
    assert all(f" {name} " in cli("methods").out for name in NAMES)


def test_methods_as_json(cli) -> None:
    records = json.loads(cli("methods", "--format", "json").out)
    assert [record["name"] for record in records] == NAMES
    assert all(record["summary"] and record["paper"] and record["data"] for record in records)


def test_methods_as_the_readme_table(cli) -> None:
    lines = cli("methods", "--format", "readme").out.splitlines()
    assert len(lines) == len(NAMES) + 2
    assert all(f"(docs/methods.md#{name})" in line for name, line in zip(NAMES, lines[2:], strict=True))
    assert {line.count("|") for line in lines} == {5}


def test_methods_as_a_page_state_every_option_and_default(cli) -> None:
    page = cli("methods", "--format", "page").out
    for method in list_methods():
        section = page.split(f"### {method.name}\n", 1)[1].split("\n### ", 1)[0]
        for f in fields(method.strategy.Config):
            row = next(line for line in section.splitlines() if line.startswith(f"| `--{f.name}` "))
            assert len(row.split("|")[3].strip()) > 10, f"--{f.name} of {method.name} is not described"
    assert "object at 0x" not in page


def test_methods_in_an_unknown_format(cli) -> None:
    answer = cli("methods", "--format", "xml")
    assert answer.status == 2
    assert "page" in answer.err


def test_needs_are_said_in_words() -> None:
    by_name = {method.name: methods.needs_of(method) for method in list_methods()}
    assert by_name["diffusion_dpo"] == "reference"
    assert by_name["mapo"] == "nothing"


def test_doctor_of_a_whole_installation(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    answer = cli("doctor")
    assert answer.status == 0
    for word in ("torch", "diffusers", "cores", "attention sdpa", "free disk here", "extra [eval]"):
        assert word in answer.out


def test_doctor_names_what_is_missing(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(doctor, "requires", lambda name: ["torch", "nothing-of-this-name>=1; extra == 'quant'"])
    present = doctor.installed
    monkeypatch.setattr(doctor, "installed", lambda name: None if name == "peft" else present(name))
    answer = cli("doctor")
    assert answer.status == 1
    assert "missing: nothing-of-this-name" in answer.out


def test_doctor_prints_brackets_of_extras(cli, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr(doctor, "backend_lines", lambda: [("attention xformers", "pip install 'diffalign[xformers]'")])
    assert "pip install 'diffalign[xformers]'" in cli("doctor").out


def test_data_check_of_good_data(cli, tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "x", "images": ["a.png", "b.png"], "winner": 0}])
    answer = cli("data", "check", path, "--kind", "pairs")
    assert answer.status == 0
    assert "pairs.jsonl: usable as pairs" in answer.out
    assert "rows: 1; examples: 1" in answer.out


def test_data_check_of_bad_data(cli, tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    (tmp_path / "cut.png").write_bytes(encoded(3)[:50])
    rows = [
        {"prompt": "x", "images": ["a.png", "b.png"], "winner": 2},
        {"prompt": "x", "images": ["a.png", "cut.png"], "winner": 0},
    ]
    answer = cli("data", "check", write_jsonl(tmp_path / "pairs.jsonl", rows))
    assert answer.status == 1
    assert "not usable as pairs" in answer.out
    assert "bad rows: 1; the first: pairs.jsonl, line 1: winner is 2" in answer.out
    assert "cut.png" in answer.out


def test_data_check_maps_columns(cli, tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    path = write_jsonl(tmp_path / "pairs.jsonl", [{"text": "x", "images": ["a.png", "b.png"], "winner": 1}])
    assert cli("data", "check", path, "--column_map", "{prompt: text}").status == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["no/such.jsonl"], "there is no data set at 'no/such.jsonl'"),
        (["bundled", "--kind", "pear"], "unknown data kind 'pear': did you mean 'pairs'?"),
    ],
)
def test_data_check_of_what_cannot_be_opened(refused, words: list[str], message: str) -> None:
    assert message in refused("data", "check", *words)


def test_data_check_without_words_shows_its_usage(cli) -> None:
    assert cli("data").status == 2
    answer = cli("data", "--help")
    assert answer.status == 0
    assert "check SOURCE --kind" in answer.out
