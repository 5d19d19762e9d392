"""Runs the code of a document as a reader would, only shorter.

The rule: blocks marked ``bash`` and ``python`` run in their order, in one folder that starts with nothing but
``my_pairs.jsonl`` and its pictures. Blocks of any other mark (``text``, ``yaml``) are shown, not run. Changed are

- runs: whatever trains gets the options of :data:`SHORT` on top, so that two steps are taken, and ``accelerate launch
  train_scripts/X.py`` becomes a call in this process; so does ``python eval/X.py``, and what
  draws there draws a few images only;
- what lies on a hub: ``--pretrained_model_name_or_path OWNER/NAME`` becomes the bundled model, and ``--dataset_name
  OWNER/NAME`` the reader's pairs, for nothing is fetched;
- set-up: ``. train_scripts/setup.sh`` and ``pip install`` have been done, and ``pytest`` is what is running.

A Python block whose preceding text ends in "save it as `NAME`" is written to that file instead.
"""

from __future__ import annotations

import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from diffalign.cli.main import main

SHORT: dict[str, Any] = {
    "max_train_steps": 2,
    "train_batch_size": 2,
    "global_batch_pairs": 0,
    "max_train_samples": 8,
    "evaluation_prompts": 2,
    "num_validation_images": 1,
    "num_inference_steps": 2,
    "mixed_precision": "no",
}
FEW = {
    "eval/generate.py": ["--limit", "3", "--steps", "1", "--batch_size", "3"],
    "eval/evaluate.py": ["--limit", "3", "--steps", "1", "--batch_size", "3"],
    "eval/reno.py": ["--limit", "2", "--steps", "2"],
}
ROOT = Path(__file__).resolve().parents[2]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_SAVED = re.compile(r"save it as\s+`([\w.]+)`\S*\s*$")
_HUB_MODEL = re.compile(r"(--pretrained_model_name_or_path)[ =](?!runs/)[\w.-]+/[\w.-]+")
_HUB_DATA = re.compile(r"(--dataset_name)[ =][\w-]+/[\w-]+(?=\s|$)")
_LAUNCH = re.compile(r"^accelerate launch(?: --\w+(?: \d+)?)* train_scripts/train(_text)?\.py\b")
_DONE = re.compile(r"^(\. train_scripts/setup\.sh|pip install\b.*|pytest\b.*)$")


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, and the file that the reader is told to save it as."""

    language: str
    text: str
    saved_as: str | None


def blocks(document: str) -> Iterator[Block]:
    """Yield the code blocks of a Markdown document."""
    for match in _BLOCK.finditer(document):
        saved = _SAVED.search(document[: match.start()].rstrip(" :\n") + " ")
        yield Block(match[1], match[2], saved[1] if saved else None)


def commands(text: str) -> list[str]:
    """Split a bash block into its commands: lines, with continuations joined and ``&&`` taken apart."""
    lines = text.replace("\\\n", " ").splitlines()
    parts = [part.strip() for line in lines if not line.lstrip().startswith("#") for part in line.split("&&")]
    return [" ".join(part.split()) for part in parts if part]


def words_of(command: str) -> list[str] | None:
    """Return the words after ``diffalign`` that a command amounts to, shortened; None for any other program."""
    launch = _LAUNCH.match(command)
    command = _HUB_DATA.sub(r"\1 my_pairs.jsonl", command)
    command = _HUB_MODEL.sub(r"\1 tiny-writer" if launch and launch[1] else r"\1 tiny-sd", command)
    launch = _LAUNCH.match(command)
    if launch:
        command = f"diffalign train{'-text' if launch[1] else ''}{command[launch.end() :]}"
    words = shlex.split(command, comments=True)
    if words[0] != "diffalign":
        return None
    trains = words[1] in ("train", "train-text") and not {"--help", "--print_config"} & set(words)
    return words[1:] + ([f"--{name}={value}" for name, value in SHORT.items()] if trains else [])


def run_evaluation(command: str) -> None:
    """Run ``python eval/X.py ...`` in this process."""
    script, *words = shlex.split(command)[1:]
    with mock.patch.object(sys, "argv", [script, *words, *FEW.get(script, [])]), pytest.raises(SystemExit) as stop:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert stop.value.code == 0, command


def run_bash(text: str, folder: Path) -> None:
    """Run a bash block."""
    for command in commands(text):
        if _DONE.match(command):
            continue
        if command.startswith("python eval/"):
            run_evaluation(command)
            continue
        words = words_of(command)
        if words is None:
            subprocess.run(["bash", "-ec", command], cwd=folder, check=True, timeout=120)
        else:
            command, _, target = command.partition(" > ")
            assert not target, f"the output of {command!r} goes to a file, which this rule does not know"
            assert main(words) == 0, command


def run_document(document: str, folder: Path) -> int:
    """Run all blocks of a document in a folder, which is the current one; return how many ran."""
    names: dict[str, Any] = {"__name__": "document"}
    count = 0
    for block in blocks(document):
        if block.language == "bash":
            run_bash(block.text, folder)
        elif block.language == "python":
            if block.saved_as:
                (folder / block.saved_as).write_text(block.text)
            else:
                exec(compile(block.text, "document", "exec"), names)
        else:
            continue
        count += 1
    return count
