"""Noise optimisation over a prompt file: files, comparison with best-of-n, and going on where it stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffalign.errors import UserError
from diffalign.evaluation.noise_benchmark import NoiseBenchmark
from diffalign.evaluation.prompt_sets import PromptSet, load_prompts
from eval.reno import reno
from tests.factories import save_tiny, tiny_policy

BENCHMARK = NoiseBenchmark(
    "tiny", "tiny-pickscore", "incompressibility", steps=3, batch_size=2, seed=7, sampling={"num_inference_steps": 1}
)


@pytest.fixture
def prompts(tmp_path: Path) -> PromptSet:
    (tmp_path / "captions.txt").write_text("a red cube\ntwo cats\na bird\n")
    return load_prompts(str(tmp_path / "captions.txt"))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_files_and_summary(prompts: PromptSet, tmp_path: Path) -> None:
    done: list[int] = []
    summary = BENCHMARK.run(prompts, tmp_path / "run", tiny_policy("sd"), done.append)
    assert done == [2, 3]
    assert summary["captions"] == 3
    figures = summary["rewards"]["tiny-pickscore"]
    rows = [json.loads((tmp_path / f"run/rows/0000{i}.json").read_text()) for i in range(3)]
    assert figures["search"] == pytest.approx(sum(row["search"]["tiny-pickscore"] for row in rows) / 3)
    assert figures["search"] >= figures["start"]
    assert figures["best_of_n"] >= figures["start"]
    assert summary["rewards"].keys() == {"tiny-pickscore", "total", "incompressibility"}
    table = (tmp_path / "run/search/images.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in table] == [prompt.text for prompt in prompts.prompts]
    assert all((tmp_path / "run/search" / json.loads(line)["image"]).is_file() for line in table)


def test_a_stopped_run_goes_on(prompts: PromptSet, tmp_path: Path) -> None:
    policy = tiny_policy("sd")

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    BENCHMARK.run(prompts, tmp_path / "whole", policy)
    with pytest.raises(KeyboardInterrupt):
        BENCHMARK.run(prompts, tmp_path / "parts", policy, stop)
    assert not (tmp_path / "parts/summary.json").exists()
    (tmp_path / "parts/rows/00001.json").unlink()  # as if it had been killed inside the block
    BENCHMARK.run(prompts, tmp_path / "parts", policy)
    whole, parts = contents(tmp_path / "whole"), contents(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert all(parts[name] == whole[name] for name in whole)
    before = (tmp_path / "parts/rows/00000.json").stat().st_mtime_ns
    BENCHMARK.run(prompts, tmp_path / "parts")  # nothing is left to do, so nothing is loaded
    assert (tmp_path / "parts/rows/00000.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="steps: 3, not 4"):
        replace(BENCHMARK, steps=4).run(prompts, tmp_path / "parts", policy)


def test_the_script(prompts: PromptSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options: dict[str, Any] = {"steps": 2, "limit": 1, "judges": "graded", "prompts": "world"}
    model = str(save_tiny("sd", tmp_path / "model"))
    assert reno(model, output=tmp_path / "run", rewards="tiny-pickscore", **options) == 0
    said = capsys.readouterr().out
    assert "1 of 1 captions" in said
    assert "graded: start" in said
