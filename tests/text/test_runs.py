"""Text through the same configuration, loop, checkpoints and reference handling as images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from diffalign.data.loader import MicroBatch
from diffalign.errors import UserError
from diffalign.policies.adapters import LoraSettings
from diffalign.references import start_full, start_lora
from diffalign.strategies.base import Context, Update
from diffalign.strategies.registry import get_method, list_methods
from diffalign.text.data import TextExample
from diffalign.text.encode import TextEncoder
from diffalign.text.evaluation import TextEvaluator
from diffalign.text.observer import SAMPLES, SUMMARY, TextObserver
from diffalign.training.assemble import build_run
from diffalign.training.processes import Processes
from diffalign.training.resolve import resolve_config
from diffalign.training.runfolder import RunFolder
from diffalign.training.update import GradientPass
from tests.text.models import tiny_text_policy

OBJECTS = ("star", "circle", "cat", "dog", "mat")
ROWS = [
    {"prompt": f"{color} {thing} :", "chosen": f"a {color} {thing}", "rejected": f"the {thing} and a cat on the mat"}
    for color in ("red", "blue")
    for thing in OBJECTS
]


@pytest.fixture
def workplace(tmp_path: Path) -> Path:
    """A folder with a model and a data set."""
    tiny_text_policy(adapter=False).save(tmp_path / "model", {})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def run(workplace: Path, method: str, name: str, **options: Any) -> Any:
    given = {
        "pretrained_model_name_or_path": str(workplace / "model"),
        "dataset_name": str(workplace / "pairs.jsonl"),
        "output_dir": str(workplace / name),
        "train_batch_size": 4,
        "max_train_steps": 4,
        "learning_rate": 1e-2,
        "rank": 4,
        "evaluation_prompts": 0,
        **options,
    }
    return build_run(resolve_config(method, given), console=Console(quiet=True)).fit()


def gradient(method: str, splits: list[list[int]], max_rows: int = 0, **constants: Any) -> list[torch.Tensor]:
    """The gradient of one update over all rows, divided into micro-batches as given."""
    policy = tiny_text_policy(adapter=False)
    reference = start_lora(policy, LoraSettings(rank=4))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in policy.adapters.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    record = get_method(method)
    strategy = record.strategy(record.strategy.Config(**constants))
    ctx = Context(policy, reference, max_rows=max_rows)
    encoder = TextEncoder(policy)
    examples = [TextExample(str(i), row["prompt"], (row["chosen"], row["rejected"])) for i, row in enumerate(ROWS)]
    batches = [encoder(MicroBatch(tuple(examples[i] for i in part), torch.tensor(part))) for part in splits]
    parameters = policy.adapters.parameters("default")
    GradientPass(strategy, ctx, parameters, Processes())(Update(batches))
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


@pytest.mark.parametrize(
    ("method", "constants"),
    [
        ("dpo", {}),
        ("dpo", {"loss_type": ["sigmoid", "sft"]}),
        ("ipo", {}),
        ("simpo", {}),
        ("simpo", {"sft_weight": 0.5}),
    ],
)
def test_gradient_does_not_depend_on_the_split(method: str, constants: dict[str, Any]) -> None:
    whole = gradient(method, [[0, 1, 2, 3, 4, 5]], **constants)
    assert any(value.abs().max() > 0 for value in whole)
    for splits, max_rows in (([[0, 4], [1, 2, 3, 5]], 0), ([[0, 1, 2, 3, 4, 5]], 5)):
        other = gradient(method, splits, max_rows, **constants)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(whole, other, strict=True))


@pytest.mark.parametrize("method", ["dpo", "ipo", "simpo"])
def test_a_run_learns_and_leaves_what_peft_loads(method: str, workplace: Path) -> None:
    result = run(workplace, method, "run", max_train_steps=25)
    lines = [json.loads(line) for line in (workplace / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["rewards/margins"] > lines[0]["rewards/margins"]
    assert lines[-1]["implicit_accuracy"] > 0.9
    assert (result.folder / "adapter_config.json").is_file()
    assert json.loads((result.folder / "adapter_config.json").read_text())["r"] == 4


def test_a_resumed_run_equals_one_without_a_break(workplace: Path) -> None:
    from safetensors.torch import load_file

    run(workplace, "dpo", "whole", max_train_steps=4)
    run(workplace, "dpo", "broken", max_train_steps=2)
    run(workplace, "dpo", "broken", max_train_steps=4, resume_from_checkpoint="latest")
    whole, broken = (load_file(workplace / name / "adapter_model.safetensors") for name in ("whole", "broken"))
    assert all(torch.equal(whole[key], broken[key]) for key in whole)


def test_pinned_draws_remember_the_reference_and_change_nothing(workplace: Path) -> None:
    from safetensors.torch import load_file

    run(workplace, "dpo", "plain", max_train_steps=6)
    run(workplace, "dpo", "cached", max_train_steps=6, pinned_draws=1)
    plain, cached = (load_file(workplace / name / "adapter_model.safetensors") for name in ("plain", "cached"))
    assert all(torch.allclose(plain[key], cached[key], atol=1e-5) for key in plain)


def test_all_weights_train_against_a_frozen_copy(workplace: Path) -> None:
    result = run(workplace, "dpo", "full", train_mode="full", learning_rate=1e-3)
    assert (result.folder / "config.json").is_file()
    assert (result.folder / "model.safetensors").is_file()
    policy = tiny_text_policy(adapter=False)
    reference = start_full(policy)
    with torch.no_grad():
        next(policy.module.parameters()).add_(1.0)
    ids = torch.tensor([[4, 5, 6]])
    mask = torch.tensor([[0, 1, 1]])
    frozen = reference.evaluate(lambda p: p.token_log_probs(ids, torch.ones_like(ids), mask))
    assert not torch.allclose(frozen, policy.token_log_probs(ids, torch.ones_like(ids), mask))


def test_a_dry_run_describes_and_trains_nothing(workplace: Path) -> None:
    result = run(workplace, "simpo", "dry", dry_run=True)
    assert result.steps == 0
    assert not (workplace / "dry").exists()


def test_the_observer_writes_table_samples_and_summary(tmp_path: Path) -> None:
    policy = tiny_text_policy(adapter=False)
    prompts = [row["prompt"] for row in ROWS]
    evaluator = TextEvaluator(
        prompts,
        ["colors"] * len(prompts),
        torch.arange(len(prompts)),
        lambda asked, said: torch.tensor([float(len(text) > 20) for text in said]),
        max_new_tokens=6,
    )
    console = Console(record=True, width=100)
    observer, folder = TextObserver(policy, evaluator, console), RunFolder(tmp_path)
    observer.before(folder)
    with torch.no_grad():
        policy.module.get_output_embeddings().weight.mul_(3)  # type: ignore[operator]
    summary = observer.after(3, folder, ())
    assert summary == json.loads((tmp_path / SUMMARY).read_text())
    assert summary["gain"][0] == pytest.approx(summary["reward_after"] - summary["reward_before"])
    assert (tmp_path / SAMPLES).read_text().count("\n") == 2 + len(prompts)
    assert "mean reward" in console.export_text()


def test_text_methods_stand_apart_from_those_of_images() -> None:
    names = {method.name for method in list_methods("text")}
    assert {"dpo", "ipo", "simpo"} <= names
    assert not names & {method.name for method in list_methods("image")}


def test_streams_are_refused(workplace: Path) -> None:
    with pytest.raises(UserError, match="streams of text"):
        run(workplace, "dpo", "stream", streaming=True, max_train_steps=1)
