"""Whole runs from options, on tiny pipelines of the real classes: Python call, command line, two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from diffalign.data.image_source import ImageSource
from diffalign.errors import UserError
from diffalign.training.checkpoint import find_checkpoint
from tests.data.support import encoded, write_images, write_jsonl
from tests.training.runs import LORA, ROOT, curve, options, train

GENTLE = {"beta": 100.0}
"""For runs that sum in different orders: 2000, the default, makes 1e-4 of a loss out of the last bit of an error."""
R01 = {"loss", "logit", "implicit_accuracy", "winner_margin", "loser_margin", "grad_norm", "effective_weight"}


def test_a_run_from_python(model: str, pairs: str, tmp_path: Path) -> None:
    result, said = train(pairs, model, tmp_path / "run")
    lines = curve(result.folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)  # policy and reference are the same at the start
    assert lines[0]["implicit_accuracy"] == 0.5
    assert all(line.keys() >= R01 for line in lines)
    assert lines[-1]["loss"] != lines[0]["loss"]
    assert "global batch 4 = micro batch 2 x accumulation 2 x 1 process" in said
    assert "5 examples" in said
    assert {path.name for path in result.folder.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "validation", "before_after.png", "checkpoints",
        "README.md", "summary.json", "tensorboard", LORA,
    }  # fmt: skip
    from diffusers import StableDiffusionPipeline

    StableDiffusionPipeline.from_pretrained(model).load_lora_weights(str(result.folder))


@pytest.mark.parametrize("side", [0, 32])
def test_the_header_says_what_beta_amounts_to(side: int, model: str, pairs: str, tmp_path: Path) -> None:
    from diffalign.policies.loading import load_policy
    from diffalign.strategies.beta import beta_for_sums

    policy = load_policy(model)
    assert policy.default_resolution == (16, 16)
    elements = int(np.prod(policy.latent_shape(side or 16, side or 16)))
    _, said = train(pairs, model, tmp_path / "run", dry_run=True, beta=2000.0, resolution=side)
    assert f"beta 2000 on errors of epsilon averaged over the {elements} elements" in " ".join(said.split())
    assert f"{beta_for_sums(2000.0, elements):.3g} on their sums" in " ".join(said.split())


def test_interrupted_with_cached_reference_values(model: str, pairs: str, tmp_path: Path) -> None:
    """What the reference said is part of the checkpoint, so the rest of the run is the same to the bit."""
    train(pairs, model, tmp_path / "straight", pinned_draws=1, use_ema=True)
    train(pairs, model, tmp_path / "halves", pinned_draws=1, use_ema=True, max_train_steps=3)
    result, said = train(
        pairs, model, tmp_path / "halves", pinned_draws=1, use_ema=True, resume_from_checkpoint="latest"
    )
    assert result.steps == 4
    assert "note: max_train_steps is 4 now, it was 3" in said
    expected, got = load_file(tmp_path / "straight" / LORA), load_file(tmp_path / "halves" / LORA)
    assert all(torch.equal(value, got[name]) for name, value in expected.items())


def test_a_run_from_a_stream_leaves_out_what_cannot_be_decoded(model: str, tmp_path: Path) -> None:
    import datasets

    rows = [
        {
            "id": str(i),
            "prompt": f"a {i}",
            "images": [encoded(2 * i), encoded(2 * i + 1)],
            "winner": 0 if i < 4 else None,
        }
        for i in range(6)
    ]
    rows[1]["images"][0] = encoded(2)[:60]  # type: ignore[index]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    result, said = train(stream, model, tmp_path / "run", max_train_steps=3, num_validation_images=0)  # type: ignore[arg-type]
    assert result.steps == 3
    # the stream was read several times: nothing counts twice
    left_out = "of the stream so far: 2 ties dropped; 1 examples with unreadable images skipped"
    assert f"note: {left_out}" in said
    assert f"\n{left_out}\ndone: 3 steps" in said
    with pytest.raises(UserError, match="cannot decode image"):
        train(stream, model, tmp_path / "strict", max_train_steps=2, strict=True)  # type: ignore[arg-type]


def test_a_short_run_decodes_and_encodes_what_it_sees(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps of two pairs of thirty; one of their images cannot be decoded, nor can others that nobody looks at."""
    names = [f"{index}.png" for index in range(60)]
    write_images(tmp_path, names)
    rows = [{"prompt": f"a {i}", "images": names[2 * i : 2 * i + 2], "winner": 0} for i in range(30)]
    write_jsonl(tmp_path / "pairs.jsonl", rows)
    decoded: set[str] = set()
    decode = ImageSource.decode

    def told(self: ImageSource, data: bytes | None = None) -> Any:
        decoded.add(Path(self.name).name)
        return decode(self, data)

    monkeypatch.setattr(ImageSource, "decode", told)
    short = {"global_batch_pairs": 2, "max_train_steps": 2}
    _, said = train(str(tmp_path / "pairs.jsonl"), model, tmp_path / "dry", dry_run=True, **short)
    assert not decoded
    _, said = train(str(tmp_path / "pairs.jsonl"), model, tmp_path / "whole", **short)
    assert "30 examples, 4 of them in this run; nothing left out" in said
    assert len(decoded) == 8
    seen = sorted(decoded)
    for name in (seen[0], *sorted({*names} - decoded)[:10]):
        (tmp_path / name).write_bytes(b"no image")
    for cached in (True, False):
        folder = tmp_path / f"spoiled-{cached}"
        _, said = train(str(tmp_path / "pairs.jsonl"), model, folder, cache_latents=cached, **short)
        assert "4 of them in this run; 1 examples with unreadable images skipped" in said
        assert [line["step"] for line in curve(folder)] == [1, 2]
    with pytest.raises(UserError, match=f"cannot decode image .*{seen[0]}"):
        train(str(tmp_path / "pairs.jsonl"), model, tmp_path / "strict", strict=True, **short)


def test_resume_with_another_rank_is_refused(model: str, pairs: str, tmp_path: Path) -> None:
    train(pairs, model, tmp_path / "run", max_train_steps=1)
    with pytest.raises(UserError, match="its rank is 2, this run's is 4"):
        train(pairs, model, tmp_path / "run", rank=4, resume_from_checkpoint="latest")


def test_full_fine_tuning_saves_a_pipeline(model: str, pairs: str, tmp_path: Path) -> None:
    result, _ = train(pairs, model, tmp_path / "run", train_mode="full", learning_rate=1e-4, max_train_steps=2)
    assert curve(result.folder)[0]["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert (result.folder / "model_index.json").is_file()


def test_an_early_failure_leaves_no_folder(model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        train(str(tmp_path / "missing.jsonl"), model, tmp_path, output_dir="")
    assert not list(tmp_path.glob("runs/*"))


def test_dry_run_writes_nothing(model: str, pairs: str, tmp_path: Path) -> None:
    result, said = train(pairs, model, tmp_path / "run", dry_run=True)
    assert result.steps == 0
    assert not (tmp_path / "run").exists()
    assert "estimated memory of one device" in said
    assert "activations" in said


def test_contradicting_batch_options(model: str, pairs: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="leave one of them out"):
        train(pairs, model, tmp_path / "run", gradient_accumulation_steps=3)
    assert not (tmp_path / "run").exists()


def test_micro_batches_do_not_change_the_curve(model: str, pairs: str, tmp_path: Path) -> None:
    whole, _ = train(pairs, model, tmp_path / "whole", train_batch_size=4, **GENTLE)
    split, _ = train(pairs, model, tmp_path / "split", train_batch_size=1, max_rows_per_forward=1, **GENTLE)
    for a, b in zip(curve(whole.folder), curve(split.folder), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)


def launch_two(model: str, pairs: str, folder: Path, *extra: str) -> subprocess.CompletedProcess[str]:
    """Start a run in two processes as a user does."""
    flags = [f"--{name}={value}" for name, value in options(model, folder, dataset_name=pairs).items()]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command += [str(ROOT / "train_scripts" / "train.py"), "--method", "diffusion_dpo", *flags, *extra]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200, check=False)


@pytest.mark.usefixtures("one_thread")
def test_two_processes_have_the_curve_of_one(model: str, pairs: str, tmp_path: Path) -> None:
    """Losses agree to 1e-4, which is what float32 sums in another order leave.

    In the second epoch the reference is remembered; examples have changed places by then.
    """
    train(pairs, model, tmp_path / "one", pinned_draws=1, **GENTLE)
    done = launch_two(model, pairs, tmp_path / "two", "--pinned_draws=1", *(f"--{k}={v}" for k, v in GENTLE.items()))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "micro batch 2 x accumulation 1 x 2 processes" in done.stdout
    assert "each of 2 processes encodes the whole data set" in done.stdout
    for a, b in zip(curve(tmp_path / "one"), curve(tmp_path / "two"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-4)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-3)
    checkpoint, _ = find_checkpoint("latest", tmp_path / "two" / "checkpoints")
    assert len(checkpoint.state["reference"]["keys"]) == 10  # those of both


def test_a_mistake_that_only_the_main_process_meets_ends_both(model: str, pairs: str, tmp_path: Path) -> None:
    watch = ("--early_stop_reward=pickscor", "--validation_prompts=['a 1']", "--validation_steps=1")
    done = launch_two(model, pairs, tmp_path / "run", *watch)
    assert done.returncode != 0
    assert "pickscore" in done.stderr + done.stdout
