"""Training of scorers: two steps of every objective, resumed runs, ties, held-out captions, bad options."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file

from diffalign.cli.main import main
from diffalign.data.image_source import ImageSource
from diffalign.data.readers import SourceOptions
from diffalign.data.schema import Record
from diffalign.errors import UserError
from diffalign.reward_training.config import Budget, RewardTrainingConfig
from diffalign.reward_training.fit import train_reward
from diffalign.reward_training.objectives import build_objective
from diffalign.reward_training.pairs import ScorerPair, draw_batch, pairs_of, read_pairs, split_captions
from diffalign.rewards.heteroscedastic import HeteroscedasticScore
from diffalign.rewards.loading import load_reward
from diffalign.rewards.pickscore import PickScore
from diffalign.rewards.ranking import label_mass
from diffalign.rewards.scoring import open_picture
from tests.docs.documents import blocks, commands
from tests.rewards.support import PROMPTS, check_gradient, waves


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pairs of four captions: red beats blue, one pair is tied; two people."""
    folder = tmp_path_factory.mktemp("pairs")
    rows = []
    for index in range(12):
        for name, colour in (("red", (255, 20 * index, 0)), ("blue", (0, 20 * index, 255))):
            Image.new("RGB", (32, 32), colour).save(folder / f"{name}{index}.png")
        names = [f"red{index}.png", f"blue{index}.png"][:: -1 if index % 2 else 1]
        row: dict[str, Any] = {"prompt": f"a picture of colour {index % 4}", "images": names, "user": index % 2}
        rows.append({**row, "winner": "tie"} if index == 7 else {**row, "winner": index % 2})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(table: Path, folder: Path, **options: Any) -> RewardTrainingConfig:
    defaults = {"batch_size": 4, "max_train_steps": 2, "lr_warmup_steps": 0, "learning_rate": 1e-4, "held_out": 0.3}
    return RewardTrainingConfig(dataset_name=str(table), output_dir=folder, **{**defaults, **options})


@pytest.mark.parametrize("objective", ["pair", "in_batch", "heteroscedastic", "pal"])
def test_two_steps_of_every_objective(objective: str, table: Path, tmp_path: Path) -> None:
    options = config(table, tmp_path / "run", objective=objective, width=8)
    result = train_reward(options)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["grad_norm"] > 0 for line in lines)
    assert result.held_out is not None
    assert result.pairs + result.held_out.pairs == 11  # a held-out tie is no preference
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["loss"] == result.loss == lines[-1]["loss"]
    assert summary["held_out"]["gain"]["value"] == result.held_out.gain.value
    images = waves(2, 64, 64)
    names = {"pal": "pal@{}", "heteroscedastic": "heteroscedastic@{}"}
    trained = load_reward(names.get(objective, "{}").format(result.folder))
    assert trained.score(images, PROMPTS).isfinite().all()
    if objective != "pal":
        assert not torch.equal(trained.score(images, PROMPTS), load_reward("tiny-pickscore").score(images, PROMPTS))
    check_gradient(trained, images, step=1e-3)


@pytest.mark.parametrize("objective", ["heteroscedastic", "pal"])
def test_four_steps_are_two_and_two(objective: str, table: Path, tmp_path: Path) -> None:
    whole = config(
        table, tmp_path / "whole", objective=objective, width=8, max_train_steps=4, lr_scheduler="constant_with_warmup"
    )
    train_reward(whole)
    halves = replace(whole, output_dir=tmp_path / "halves")
    train_reward(replace(halves, max_train_steps=2))
    with pytest.raises(UserError, match="holds a run already"):
        train_reward(halves)
    with pytest.raises(UserError, match=r"its batch_size is 4, this run's is 6"):
        train_reward(replace(halves, resume=True, batch_size=6))
    with pytest.raises(UserError, match=r"its max_train_steps is 2, this run's is 4"):
        train_reward(replace(halves, resume=True, lr_scheduler="cosine"))  # would fall to 0 at another step
    train_reward(replace(halves, resume=True))
    metrics = [(tmp_path / part / "metrics.jsonl").read_text() for part in ("whole", "halves")]
    assert metrics[0] == metrics[1]
    for file in (tmp_path / "whole").glob("*.safetensors"):
        again = load_file(tmp_path / "halves" / file.name)
        assert [key for key, value in load_file(file).items() if not torch.equal(value, again[key])] == []


def test_pairs_are_learnt(table: Path, tmp_path: Path) -> None:
    options = config(table, tmp_path / "run", max_train_steps=12, held_out=0.0, batch_size=12, learning_rate=5e-4)
    result = train_reward(options)
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    assert result.loss < 0.5 * first["loss"]
    assert result.held_out is None


def test_doubt_lowers_a_cautious_reward(table: Path, tmp_path: Path) -> None:
    train_reward(config(table, tmp_path, objective="heteroscedastic"))
    plain, cautious = (HeteroscedasticScore.load(str(tmp_path), caution) for caution in (0.0, 2.0))
    images = waves(2, 64, 64)
    _, variance = plain.distributions(plain.preprocess(images), PROMPTS)
    difference = plain.score(images, PROMPTS) - cautious.score(images, PROMPTS)
    torch.testing.assert_close(difference, 2 * variance.sqrt())
    with pytest.raises(UserError, match=r"train_reward\.py --objective heteroscedastic"):
        load_reward("heteroscedastic")
    with pytest.raises(UserError, match="no checkpoint at"):
        load_reward("heteroscedastic@tiny-pickscore")


def test_records_become_pairs_with_ties_and_people() -> None:
    images = tuple(ImageSource.from_bytes(b"", name) for name in "abc")
    record = Record("r", "p", images, scores=(2.0, 1.0, 2.0))
    pairs = pairs_of(record, "7")
    assert [(p.first.name, p.second.name, p.label, p.user) for p in pairs] == [
        ("a", "b", 1.0, "7"),
        ("a", "c", 0.5, "7"),
        ("b", "c", 0.0, "7"),
    ]
    tied = pairs_of(Record("r", "p", images[:2], tie=True))
    assert [(p.label, p.user) for p in tied] == [(0.5, "everyone")]


def test_people_are_named_by_a_column_of_any_kind_or_by_metadata(table: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    rows[0]["annotator"], rows[1]["metadata"] = "anna", {"annotator": "berta"}
    path = table.parent / "votes.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = read_pairs(str(path), SourceOptions(), "annotator")
    assert [pair.user for pair in pairs[:3]] == ["anna", "berta", "everyone"]
    assert {pair.user for pair in read_pairs(str(path), SourceOptions())} == {"0", "1"}
    with pytest.raises(UserError, match=r"no row of .* has a 'judge': name the column"):
        train_reward(config(table, tmp_path, objective="pal", user_column="judge"))


def some_pairs(count: int) -> list[ScorerPair]:
    image = ImageSource.from_bytes(b"", "x")
    return [ScorerPair(f"caption {index // 3}", image, image, float(index)) for index in range(count)]


def test_captions_are_held_out_as_wholes_and_alike() -> None:
    trained, kept_back = split_captions(some_pairs(90), 0.4)
    assert not {p.prompt for p in trained} & {p.prompt for p in kept_back}
    assert len(trained) + len(kept_back) == 90
    assert 10 < len(kept_back) < 70
    assert {p.siblings for p in trained} == {3}
    shouted = [replace(pair, prompt=f" {pair.prompt.upper()}\n") for pair in some_pairs(90)]
    both, apart = split_captions([*some_pairs(90), *shouted], 0.4)
    assert len(apart) == 2 * len(kept_back)
    assert not {p.prompt.lower().strip() for p in both} & {p.prompt for p in kept_back}
    fewer, _ = split_captions(some_pairs(60), 0.4)
    assert {p.prompt for p in fewer} <= {p.prompt for p in trained}
    with pytest.raises(UserError, match="lower it"):
        split_captions(some_pairs(3), 0.9999)


def test_batches_depend_on_the_step_alone_and_cover_epochs() -> None:
    pairs = some_pairs(10)
    batches = [draw_batch(pairs, step, 4, seed=0) for step in range(5)]
    labels = [pair.label for batch in batches for pair in batch]
    assert sorted(labels[:10]) == sorted(labels[10:]) == [float(i) for i in range(10)]
    assert labels[:10] != labels[10:]
    assert len(draw_batch(pairs[:3], 0, 8, seed=0)) == 8


def test_right_wrong_and_tied() -> None:
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [3.0, 1.0]])
    assert label_mass(scores, torch.tensor([1.0, 1.0, 1.0, 0.5])).tolist() == [1.0, 0.0, 0.5, 0.5]


def test_the_command_and_its_mistakes(table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--dataset_name", str(table), "--output_dir", str(tmp_path / "run"), "--max_train_steps", "2"]
    words += ["--batch_size", "4", "--objective", "pal", "--width", "8", "--held_out", "0.3"]
    assert main(["train-reward", *words]) == 0
    output = capsys.readouterr().out
    assert "held-out captions, 95 % intervals" in output
    assert "gain   " in output
    assert f"scorer in {tmp_path / 'run'}" in output
    assert main(["train-reward", *words]) == 2
    assert "holds a run already" in capsys.readouterr().err
    with pytest.raises(UserError, match="held_out is 1"):
        RewardTrainingConfig(held_out=1.0)
    with pytest.raises(UserError, match="unknown objective 'pairs': did you mean 'pair'"):
        RewardTrainingConfig(objective="pairs")  # type: ignore[arg-type]


def test_the_commands_of_the_document(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "votes.jsonl").write_text(table.read_text())
    for image in table.parent.glob("*.png"):
        (tmp_path / image.name).write_bytes(image.read_bytes())
    text = (Path(__file__).parents[2] / "docs" / "rewards.md").read_text()
    lines = [command for block in blocks(text) if block.language == "bash" for command in commands(block.text)]
    trainings = [line for line in lines if line.startswith("diffalign train-reward")]
    assert len(trainings) >= 3
    for line in trainings:
        assert main([*shlex.split(line)[1:], "--max_train_steps=2", "--batch_size=4", "--held_out=0.02"]) == 0
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    Image.new("RGB", (40, 32), "red").save(pictures / "0.png")
    (pictures / "0.txt").write_text(PROMPTS[0])
    (line,) = [
        c for b in blocks(text) if b.language == "bash" for c in commands(b.text) if c.startswith("diffalign score")
    ]
    assert main(shlex.split(line.replace("IMAGES", str(pictures)))[1:]) == 0
    for block in blocks(text):
        if block.language == "python":
            exec(block.text, {"images": waves(2, 64, 64), "prompts": PROMPTS})
    votes = load_reward("pal@runs/taste#1").score(waves(2, 64, 64), PROMPTS)
    assert votes.shape == (2,)


def test_bundled_images_are_judged_by_the_verifier_unless_a_column_map_is_given(tmp_path: Path) -> None:
    """By their own scores tiny-pickscore, whose they are, is right on all; by the verifier on a part."""
    right = {}
    for columns in (RewardTrainingConfig().columns, {}):
        trained, kept_back = split_captions(read_pairs("bundled", SourceOptions(column_map=columns)), 0.1)
        assert not {pair.prompt for pair in trained} & {pair.prompt for pair in kept_back}
        some = [pair for pair in kept_back if not pair.tied][::12]
        objective = build_objective(PickScore.load("tiny-pickscore"), RewardTrainingConfig(device="cpu"), some)
        right[len(columns)] = label_mass(objective.scores(some).detach(), objective.labels(some)).mean().item()
    assert right[0] > 0.99
    assert 0.5 < right[1] < 0.9


def test_the_columns_that_are_used_are_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = train_reward(RewardTrainingConfig(output_dir=tmp_path, max_train_steps=1, batch_size=4, held_out=0.02))
    output = capsys.readouterr().out
    assert "of them ties; " in output
    assert "held out; scores from column graded\n" in output
    assert result.held_out is not None
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["column_map"] == {"scores": "graded"}
    assert RewardTrainingConfig(dataset_name="votes.jsonl").resolved().column_map == {}
    assert RewardTrainingConfig(column_map={}).resolved().column_map == {}


def test_a_start_with_nothing_left_to_learn_is_noted(
    table: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    judge = load_reward("tiny-pickscore")
    for row in rows:
        with_images = [open_picture(table.parent / name) for name in row["images"]]
        row["winner"] = int(judge.score_pictures(with_images, [row["prompt"]] * 2).argmax())
    path = table.parent / "judged.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for file in (path, table):
        train_reward(config(file, tmp_path / file.stem, max_train_steps=1))
        assert ("right before any training" in capsys.readouterr().out) == (file == path)


def test_small_models_have_a_small_budget() -> None:
    assert RewardTrainingConfig().budget == Budget(300, 32, 2e-4, 30, "cosine")
    assert RewardTrainingConfig(model="laion/CLIP-ViT-H-14-laion2B-s32B-b79K").budget == Budget(
        4000, 128, 3e-6, 500, "constant_with_warmup"
    )
    assert RewardTrainingConfig(objective="pal", batch_size=4).budget == Budget(
        4000, 4, 1e-4, 500, "constant_with_warmup"
    )
    assert RewardTrainingConfig(max_train_steps=7).resolved().batch_size == 32
