"""Looking at a model while it trains: what is drawn, and how it is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor

from diffalign.data.held_out import hold_out
from diffalign.data.schema import Example, ExampleSet, StreamSet
from diffalign.data.team import Alone
from diffalign.errors import UserError
from diffalign.evaluation import sharing
from diffalign.evaluation.evaluator import ImageEvaluator
from diffalign.evaluation.sharing import latents_together
from diffalign.inference.generate import generate_latents
from diffalign.policies.base import Policy
from diffalign.policies.saving import read_lora_metadata
from diffalign.policies.unet import UNetPolicy
from diffalign.rewards.jpeg import JpegSize
from diffalign.rewards.loading import load_reward
from diffalign.training.config import RunOptions
from diffalign.training.judged import LookedAt
from diffalign.training.processes import Processes
from diffalign.training.runfolder import RunFolder
from diffalign.training.validation import ImageObserver
from tests.factories import tiny_policy
from tests.meeting import meet
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


WATCH = {"early_stop_reward": "incompressibility", "validation_steps": 1, "num_validation_images": 2}


def drawn(folder: Path) -> list[str]:
    lines = (folder / "validation" / "prompts.txt").read_text().splitlines()
    return [line.split(": ", 1)[1] for line in lines]


def test_a_file_of_captions_is_judged_beyond_the_grid(model: str, pairs: str, tmp_path: Path) -> None:
    (tmp_path / "captions.txt").write_text("A  0\na dog\n\na cat\na cow\n")
    given = {**WATCH, "validation_prompts": [str(tmp_path / "captions.txt")], "max_train_steps": 1}
    result, said = train(pairs, model, tmp_path / "all", **given)
    assert drawn(result.folder) == ["A  0", "a dog"]
    assert result.summary["captions"] == 4
    assert result.summary["settings"]["captions"] == "validation"
    assert "note: 1 of 4 captions that --early_stop_reward judges are trained on" in said
    assert "4 validation captions, same seeds" in said
    names = (result.folder / "metrics.jsonl").read_text()
    assert "held_out/" not in names
    result, _ = train(pairs, model, tmp_path / "three", **given, early_stop_prompts=3)
    assert result.summary["captions"] == 3


def test_captions_that_are_taken_out_of_the_data_are_judged(model: str, pairs: str, tmp_path: Path) -> None:
    result, said = train(pairs, model, tmp_path / "run", **WATCH, held_out_prompts=2, max_train_steps=2)
    assert "3 examples; 2 examples of 2 held-out captions" in said
    assert "judges are trained on" not in said
    assert result.summary["captions"] == 2
    assert result.summary["settings"]["captions"] == "held_out"
    lines = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    assert any("held_out/incompressibility" in line for line in lines)


def test_held_out_captions_do_not_depend_on_the_others() -> None:
    """Nor are they trained on in another spelling, or as what another image mismatches."""
    names = [f"a {index}" for index in range(20)]
    examples = [Example(str(index), (name,)) for index, name in enumerate(names)]
    held = hold_out(ExampleSet("prompts", examples), 5)
    assert held.held_out is not None
    chosen = held.held_out("tune", 5, 0).prompts
    assert held.held_out("tune", 2, 0).prompts == chosen[:2]
    assert len(held.examples) == 15
    fewer = hold_out(ExampleSet("prompts", [e for e in examples if e.prompts[0] != chosen[0]]), 4)
    assert fewer.held_out is not None
    assert fewer.held_out("tune", 4, 0).prompts == chosen[1:]
    other = Example("other", (chosen[0].upper().replace(" ", "  "),))
    wrong = Example("wrong", (names[0], chosen[1]))
    assert hold_out(ExampleSet("prompts", [*examples, other, wrong]), 5).examples == held.examples


def test_a_stream_has_no_captions_to_take_out() -> None:
    with pytest.raises(UserError, match="a data set that is not streamed: give captions by --validation_prompts"):
        hold_out(StreamSet("pairs", lambda: iter(())), 1)


def test_a_reward_that_reads_descriptions_wants_them(model: str, pairs: str, tmp_path: Path) -> None:
    from diffalign.world.grammar import prompts

    watch = {**WATCH, "early_stop_reward": "graded", "max_train_steps": 1}
    with pytest.raises(UserError, match="the reward graded reads a description of each caption"):
        train(pairs, model, tmp_path / "bare", **watch, validation_prompts=["a red circle"])
    rows = [{"prompt": record.text, "metadata": record.metadata} for record in prompts("tune", 3, 0)]
    (tmp_path / "captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result, _ = train(pairs, model, tmp_path / "run", **watch, validation_prompts=[str(tmp_path / "captions.jsonl")])
    assert result.summary["rewards"].keys() == {"graded"}


def test_the_bundled_world_is_judged_by_captions_of_its_own(model: str, tmp_path: Path) -> None:
    few = {"max_train_samples": 4, "max_train_steps": 1, "evaluation_prompts": 0, "early_stop_prompts": 3}
    result, _ = train("bundled", model, tmp_path / "run", **WATCH, **few)
    assert result.summary["captions"] == 3
    assert result.summary["settings"]["captions"] == "held_out"
    assert result.summary["rewards"].keys() == {"incompressibility"}


def test_the_precision_is_that_of_training_and_rewards_keep_theirs(
    model: str, pairs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixed: dict[str, set[bool]] = {"predict": set(), "score": set()}

    def watched(owner: type, name: str) -> None:
        inner = getattr(owner, name)

        def seen(*arguments: Any, **named: Any) -> Any:
            mixed[name].add(torch.is_autocast_enabled("cpu"))
            return inner(*arguments, **named)

        monkeypatch.setattr(owner, name, seen)

    watched(UNetPolicy, "predict")
    watched(JpegSize, "score")
    brief = {"train_mode": "full", "mixed_precision": "bf16", "max_train_steps": 1, "validation_prompts": ["a cat"]}
    train(pairs, model, tmp_path / "run", **WATCH, **brief)
    assert mixed == {"predict": {True}, "score": {False}}


def test_processes_share_out_what_is_sampled(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts, seeds = ["a cat", "a dog", "a cow"], [3, 1, 2]
    settings = {"num_steps": 2, "guidance_scale": 2.0, "resolution": (32, 16)}
    expected = generate_latents(tiny_policy("sd"), prompts, seeds, **settings)  # type: ignore[arg-type]
    assert torch.equal(latents_together(tiny_policy("sd"), prompts, seeds, Alone(), **settings), expected)  # type: ignore[arg-type]
    sampled: list[list[str]] = []

    def counted(policy: Policy, prompts: Sequence[str], *arguments: Any, **named: Any) -> Tensor:
        sampled.append(list(prompts))
        return generate_latents(policy, prompts, *arguments, **named)

    monkeypatch.setattr(sharing, "generate_latents", counted)
    models = [tiny_policy("sd") for _ in range(4)]  # not in threads, which share one generator
    for count, parts in ((2, [["a cat", "a cow"], ["a dog"]]), (4, [["a cat"], ["a cow"], ["a dog"]])):
        sampled.clear()
        found = meet(count, lambda team: latents_together(models[team.rank], prompts, seeds, team, **settings))  # type: ignore[arg-type]
        assert sorted(sampled) == parts
        for latents in found:
            assert torch.allclose(latents, expected, atol=1e-5)


def observer(processes: Processes, policy: Policy, watched: str = "incompressibility") -> ImageObserver:
    seen = LookedAt(("a cat", "a dog", "a cow"))
    rewards = {watched: load_reward(watched)} if processes.is_main else {}
    evaluator = ImageEvaluator(["a cat", "a dog"], [{}, {}], [0, 1], rewards, watched, (16, 16))
    options = RunOptions(num_inference_steps=2, guidance_scale=2.0)
    return ImageObserver(policy, seen, evaluator, options, (16, 16), processes, watched=watched)


def test_two_processes_see_what_one_sees(tmp_path: Path) -> None:
    models = [tiny_policy("sd") for _ in range(2)]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()

    def look(processes: Processes, folder: Path) -> tuple[float | None, float | None, dict[str, Any]]:
        sees, run = observer(processes, models[processes.rank]), RunFolder(folder)
        return sees.before(run), sees.during(1, run, ()), sees.after(1, run, ())

    one = look(Processes(), tmp_path / "one")
    two, other = meet(2, lambda processes: look(processes, tmp_path / "two"))
    assert two[0] == pytest.approx(one[0], rel=1e-3)
    assert two[0] == two[1]
    assert two[2].keys() == one[2].keys()
    assert other == (None, None, {})
    files = [sorted(str(p.relative_to(f)) for p in f.rglob("*")) for f in (tmp_path / "one", tmp_path / "two")]
    assert files[0] == files[1]


@pytest.mark.parametrize("rank", [0, 1])
def test_sampling_that_fails_in_one_process_ends_both(
    rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = [tiny_policy("sd") for _ in range(2)]
    monkeypatch.setattr(models[rank], "latent_shape", lambda *_: 1 / 0)

    def look(processes: Processes) -> None:
        sees = observer(processes, models[processes.rank])
        with pytest.raises(ZeroDivisionError if processes.rank == rank else UserError):
            sees.before(RunFolder(tmp_path))

    meet(2, look)
