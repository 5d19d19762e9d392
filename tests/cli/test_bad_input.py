"""What people get wrong, end to end: one clear message, status 2, and nothing half-written.

Every mistake goes through the training command, on a tiny random model and pictures made here.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest

import diffalign
from diffalign.errors import UserError
from tests.data.support import encoded, write_images, write_jsonl
from tests.factories import save_tiny

LORA = "pytorch_lora_weights.safetensors"
METHOD = "diffusion_dpo"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd", tmp_path_factory.mktemp("model"))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    write_images(tmp_path / "data", [f"{index}.png" for index in range(6)])
    return tmp_path / "data"


def pair(index: int, **changes: Any) -> dict[str, Any]:
    return {"prompt": f"a {index}", "images": [f"{2 * index}.png", f"{2 * index + 1}.png"], "winner": 0, **changes}


def words(model: Path, data: Path, run: Path, *more: str, method: str = METHOD) -> list[str]:
    """The command of a small run; options given last override."""
    return [
        "train", "--method", method, "--pretrained_model_name_or_path", str(model), "--dataset_name", str(data),
        "--output_dir", str(run), "--rank", "2", "--max_train_steps", "1", "--train_batch_size", "2",
        "--num_validation_images", "0", *more,
    ]  # fmt: skip


@pytest.fixture
def good(pictures: Path) -> Path:
    return write_jsonl(pictures / "pairs.jsonl", [pair(0), pair(1), pair(2)])


OPTIONS: dict[str, tuple[list[str], list[str]]] = {
    "unknown method": (["--method", "difusion_dpo"], ["unknown method 'difusion_dpo'", "did you mean 'diffusion_dpo'"]),
    "unknown option": (["--learning_rte", "1"], ["learning_rte", "did you mean 'learning_rate'?"]),
    "abbreviated option": (["--learning_rat", "1"], ["learning_rat", "did you mean 'learning_rate'?"]),
    "unknown option of the method": (["--betta", "1"], ["betta", "did you mean 'beta'?"]),
    "wrong type": (["--max_train_steps", "many"], ["max_train_steps", "many", "int"]),
    "a choice that does not exist": (["--lr_scheduler", "cosin"], ["lr_scheduler", "cosin"]),
    "contradicting batch options": (
        ["--global_batch_pairs", "7", "--gradient_accumulation_steps", "3"],
        ["--global_batch_pairs 7", "leave one of them out"],
    ),
    "a model that does not exist": (["--pretrained_model_name_or_path", "tiny-sdd"], ["tiny-sdd", "'tiny-sd'"]),
    "mismatched resolution": (["--resolution", "13"], ["13x13 pixels", "multiples of"]),
    "a data set that does not exist": (
        ["--dataset_name", "no/such.jsonl"],
        ["there is no data set at 'no/such.jsonl'"],
    ),
}


@pytest.mark.parametrize("mistake", OPTIONS)
def test_mistaken_options(refused, model: Path, good: Path, tmp_path: Path, mistake: str) -> None:
    more, expected = OPTIONS[mistake]
    message = refused(*words(model, good, tmp_path / "run", *more))
    assert all(part in message for part in expected), message
    assert not (tmp_path / "run").exists()


DATA: dict[str, tuple[list[dict[str, Any]], list[str]]] = {
    "missing column": ([{"prompt": "a", "winner": 0}], ["pairs.jsonl", "images", "prompt, winner"]),
    "empty data": ([], ["pairs.jsonl", "is empty: it holds no row"]),
    "all ties": ([pair(0, winner=None), pair(1, winner=None)], ["nothing to train on is left", "2 ties dropped"]),
    "zero-length prompt": ([pair(0), pair(1, prompt="")], ["pairs.jsonl, line 2", "prompt is empty"]),
    "an index beyond the images": ([pair(0, winner=2)], ["pairs.jsonl, line 1", "winner is 2"]),
    "a picture that is not there": ([pair(0), pair(9)], ["18.png"]),
}


@pytest.mark.parametrize("mistake", DATA)
def test_mistaken_data(refused, model: Path, pictures: Path, tmp_path: Path, mistake: str) -> None:
    rows, expected = DATA[mistake]
    path = write_jsonl(pictures / "pairs.jsonl", rows)
    more = ["--strict", "true"] if mistake == "a picture that is not there" else []
    message = refused(*words(model, path, tmp_path / "run", *more))
    assert all(part in message for part in expected), message
    assert not (tmp_path / "run").exists()


def test_an_unreadable_image_is_skipped_and_counted(cli, model: Path, good: Path, tmp_path: Path) -> None:
    (good.parent / "3.png").write_bytes(encoded(3)[:50])
    answer = cli(*words(model, good, tmp_path / "run", "--max_train_steps", "2"))  # all three are seen
    assert answer.status == 0, answer.err
    said = " ".join(answer.out.split())
    assert "pairs.jsonl: 2 examples" in said
    assert "1 examples with unreadable images skipped" in said
    assert (tmp_path / "run" / LORA).is_file()


def test_an_unreadable_image_is_refused_by_name_where_strict(refused, model: Path, good: Path, tmp_path: Path) -> None:
    (good.parent / "3.png").write_bytes(encoded(3)[:50])
    assert "3.png" in refused(*words(model, good, tmp_path / "run", "--strict", "true"))
    assert not (tmp_path / "run").exists()


def test_only_unreadable_images(refused, model: Path, good: Path, tmp_path: Path) -> None:
    for index in range(6):
        (good.parent / f"{index}.png").write_bytes(b"no picture")
    message = refused(*words(model, good, tmp_path / "run", "--max_train_steps", "2"))
    assert "3 examples with unreadable images skipped" in message
    assert not (tmp_path / "run").exists()


def test_the_output_folder_of_another_run(cli, refused, model: Path, good: Path, tmp_path: Path) -> None:
    """Also: its checkpoint under another method, another rank, a folder without one, a path that does not exist."""
    run = tmp_path / "run"
    assert cli(*words(model, good, run)).status == 0
    before = contents(run)

    message = refused(*words(model, good, run))
    assert "already holds a run of 'diffusion_dpo'" in message
    assert "--resume_from_checkpoint latest" in message

    resume = ["--resume_from_checkpoint", "latest"]
    message = refused(*words(model, good, run, *resume, method="mapo"))
    assert "a run of method 'diffusion_dpo': it cannot be continued with 'mapo'" in message
    message = refused(*words(model, good, run, *resume, "--rank", "4"))
    assert "its rank is 2, this run's is 4" in message
    message = refused(*words(model, good, tmp_path / "nowhere", *resume))
    assert "nothing to resume" in message
    message = refused(*words(model, good, run, "--resume_from_checkpoint", str(run / "checkpoints" / "step-7")))
    assert "no checkpoint folder" in message
    assert "step-00000001" in message

    assert contents(run) == before
    assert not (tmp_path / "nowhere").exists()


def test_an_output_folder_with_other_files(refused, model: Path, good: Path) -> None:
    assert "already holds other files" in refused(*words(model, good, good.parent))


def test_a_checkpoint_cut_short(cli, refused, model: Path, good: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert cli(*words(model, good, run)).status == 0
    weights = run / "checkpoints" / "step-00000001" / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    message = refused(*words(model, good, run, "--resume_from_checkpoint", "latest"))
    assert "no whole checkpoint" in message
    assert "weights.safetensors has" in message


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_no_space_for_a_checkpoint(
    refused, model: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffalign.training.checkpoint.save_file", full_disk)
    run = tmp_path / "run"
    message = refused(*words(model, good, run))
    assert "No space left on device" in message
    assert "Free some space" in message
    assert list((run / "checkpoints").iterdir()) == []
    assert not (run / LORA).exists()


def test_no_space_for_the_weights(
    refused, model: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training is over: its checkpoint is whole, and the export leaves no half file."""
    monkeypatch.setattr("diffalign.policies.saving.save_file", full_disk)
    run = tmp_path / "run"
    assert "No space left on device" in refused(*words(model, good, run))
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (run / LORA).exists()


def test_no_space_for_the_run_folder(
    refused, model: Path, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, *_: Any, **__: Any) -> None:
        full_disk()

    monkeypatch.setattr(Path, "mkdir", full)
    assert "cannot write to the run folder" in refused(*words(model, good, tmp_path / "run"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "difusion_dpo"}, "did you mean 'diffusion_dpo'"),
        ({"learning_rte": 1e-4}, "did you mean 'learning_rate'"),
        ({"beta": "strong"}, "option 'beta' is 'strong', a str, but must be of type float"),
        ({"max_train_steps": 2.5}, "option 'max_train_steps' is 2.5, a float, but must be of type int"),
        ({"strict": 1}, "must be of type bool"),
        ({"mixed_precision": "bf15"}, "must be one of 'no', 'fp16', 'bf16': did you mean 'bf16'"),
        ({"report_to": ["tensorbord"]}, "must be a list, each one of 'tensorboard', 'wandb'"),
        ({"global_batch_pairs": 7, "gradient_accumulation_steps": 3}, "leave one of them out"),
        ({"beta": -5.0}, r"beta is -5\.0: expected a number above 0"),
        ({"max_train_steps": -3}, "max_train_steps is -3: expected 0 or more"),
        ({"logging_steps": 0}, "logging_steps is 0: expected 1 or more"),
        ({"evaluation_prompts": -5}, "evaluation_prompts is -5: expected 0 or more"),
        ({"adam_beta1": 2.0}, r"--adam_beta1 must lie in \[0, 1\), not 2.0"),
        ({"max_train_samples": -1}, "max_train_samples is -1: expected 0 or more"),
    ],
)
def test_mistakes_in_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        diffalign.train([], **{"method": METHOD, **change})
    assert list(tmp_path.iterdir()) == []


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
