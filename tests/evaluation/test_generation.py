"""Drawing the images of an evaluation: seeds, names, resumption, division among processes, records."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from diffalign.errors import UserError
from diffalign.evaluation.generation import blocks
from diffalign.evaluation.geneval.folder import read_folder
from diffalign.evaluation.layouts import plan
from diffalign.evaluation.leaderboard.entries import STARTS, BoardSettings
from diffalign.evaluation.presets import PRESETS, SAMPLE_STRIDE, SamplingPreset, choose_preset
from diffalign.evaluation.prompt_sets import EvalPrompt, load_prompts
from diffalign.rewards.scoring import read_items
from tests.evaluation.conftest import EVAL
from tests.factories import save_tiny

QUICK = ("--steps", "1", "--guidance", "1", "--batch_size", "2")


@dataclass
class Worker:
    rank: int
    world_size: int


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny("sd", tmp_path_factory.mktemp("model"))


@pytest.fixture
def captions(tmp_path: Path) -> Path:
    path = tmp_path / "captions.txt"
    path.write_text("a cat\n\na dog\na cat\n")
    return path


def pictures(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def test_a_folder_with_its_records(script, model: Path, captions: Path, tmp_path: Path) -> None:
    words = ("--model", model, "--prompts", captions, *QUICK)
    answer = script("generate", *words, "--output", tmp_path / "out", "--images_per_prompt", "2")
    assert answer.status == 0, answer.err
    assert "6 images" in answer.out
    items = read_items(tmp_path / "out" / "images.jsonl")
    assert [item.prompt for item in items] == ["a cat", "a cat", "a dog", "a dog", "a cat", "a cat"]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["preset"] == "sd-v1 (guidance=1.0, images_per_prompt=2, steps=1)"
    assert manifest["sampling"]["dtype"] == "float32"
    assert (manifest["sampling"]["height"], manifest["sampling"]["width"]) == (16, 16)
    assert manifest["prompts"]["used"] == 3
    assert len(manifest["prompts"]["sha256"]) == 64
    assert manifest["model"]["adapter"] is None
    drawn = pictures(tmp_path / "out")
    assert len(drawn) == 6
    assert len(set(drawn.values())) == 6, "equal captions at two places have noise of their own"


def test_a_stopped_run_goes_on_to_the_same_bytes(script, refused, model: Path, captions: Path, tmp_path: Path) -> None:
    words = ("--model", model, "--prompts", captions, *QUICK)
    assert script("generate", *words, "--output", tmp_path / "whole").status == 0
    output = tmp_path / "stopped"
    assert script("generate", *words, "--output", output).status == 0
    (output / "images" / "00001_0.png").unlink()
    (output / "images.jsonl").unlink()
    answer = script("generate", *words, "--output", output)
    assert "3 images" in answer.out
    assert "(2 drawn now)" in answer.out, "the block of the missing image, and no other"
    assert pictures(output) == pictures(tmp_path / "whole")
    assert (output / "images.jsonl").read_text() == (tmp_path / "whole" / "images.jsonl").read_text()

    message = refused("generate", *words, "--output", output, "--steps", "2")
    assert "sampling.steps: 1, not 2" in message
    captions.write_text("a cat\na dog\na cow\n")
    assert "prompts.sha256" in refused("generate", *words, "--output", output)
    assert "already holds other files" in refused("generate", *words, "--output", tmp_path)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
def test_processes_share_the_images_without_padding(world_size: int) -> None:
    shots = plan([EvalPrompt(str(i)) for i in range(11)], SamplingPreset("x", 1, 1.0), "flat")
    shares = [list(blocks(shots, 2, Worker(rank, world_size))) for rank in range(world_size)]
    drawn = [shot.index for share in shares for block in share for shot in block]
    assert sorted(drawn) == list(range(11))
    whole = {tuple(block) for block in blocks(shots, 2, Worker(0, 1))}
    assert {tuple(block) for share in shares for block in share} == whole, "batches do not depend on the processes"


@pytest.mark.slow
def test_three_processes_draw_what_one_draws(script, model: Path, captions: Path, tmp_path: Path) -> None:
    captions.write_text("".join(f"a {i}\n" for i in range(7)))
    words = ["--model", str(model), "--prompts", str(captions), *QUICK]
    assert script("generate", *words, "--output", tmp_path / "one").status == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "3"]
    command = [*launch, str(EVAL / "generate.py"), *words, "--output", str(tmp_path / "three")]
    subprocess.run(command, check=True, timeout=600)
    assert pictures(tmp_path / "three") == pictures(tmp_path / "one")


def test_an_adapter_changes_the_images_and_is_recorded(script, model: Path, captions: Path, tmp_path: Path) -> None:
    from diffalign.policies.loading import load_policy
    from tests.factories import TINY_LORA

    policy = load_policy(model)
    policy.adapters.add("default", TINY_LORA)
    for parameter in policy.adapters.parameters("default"):
        parameter.data.fill_(0.5)
    policy.save(tmp_path / "lora", {"base_model": str(model)})
    words = ("--prompts", captions, *QUICK)
    assert script("generate", "--model", model, *words, "--output", tmp_path / "base").status == 0
    given = ("--model", model, "--adapter", tmp_path / "lora")
    assert script("generate", *given, *words, "--output", tmp_path / "tuned").status == 0
    assert script("generate", "--model", tmp_path / "lora", *words, "--output", tmp_path / "folder").status == 0
    assert pictures(tmp_path / "tuned") != pictures(tmp_path / "base")
    assert pictures(tmp_path / "tuned") == pictures(tmp_path / "folder")
    manifests = [json.loads((tmp_path / name / "manifest.json").read_text()) for name in ("base", "tuned")]
    assert manifests[0]["model"]["adapter"] is None
    assert len(manifests[1]["model"]["adapter"]["sha256"]) == 64
    assert manifests[0]["model"]["fingerprint"] == manifests[1]["model"]["fingerprint"]


def test_seeds_of_presets() -> None:
    alone = PRESETS["sd-v1"]
    assert [alone.seed_of(i, 0) for i in range(3)] == [0, 1, 2]
    assert alone.seed_of(5, 1) == 5 + SAMPLE_STRIDE
    shared = PRESETS["geneval-v1"]
    assert [shared.seed_of(i, 1) for i in range(3)] == [42 + SAMPLE_STRIDE] * 3
    assert alone.changed(steps=None, guidance=7.5) is alone
    assert alone.changed(steps=20).name == "sd-v1 (steps=20)"
    with pytest.raises(UserError, match="must be positive"):
        alone.changed(images_per_prompt=0)


@pytest.mark.parametrize("model", STARTS)
def test_the_bundled_presets_are_those_of_the_leaderboard(model: str) -> None:
    tiny = choose_preset(None, model, "any")
    assert (tiny.steps, tiny.guidance) == (BoardSettings().num_steps, STARTS[model].guidance_scale)


def test_the_layouts_of_benchmarks() -> None:
    preset = SamplingPreset("x", 1, 1.0, images_per_prompt=2)
    plain = [EvalPrompt("a red/blue cat"), EvalPrompt("b")]
    assert [s.place for s in plan(plain, preset, "compbench")] == [
        "samples/a red blue cat_000000.png", "samples/a red blue cat_000001.png", "samples/b_000002.png",
        "samples/b_000003.png",
    ]  # fmt: skip
    single = SamplingPreset("x", 1, 1.0)
    style = [EvalPrompt("a", {"style": "photo", "index": 7})]
    assert [s.place for s in plan(style, single, "hps")] == ["photo/00007.jpg"]
    assert [s.place for s in plan([EvalPrompt("a", {"index": "12"})], preset, "unigenbench")] == [
        "12_0.png", "12_1.png",
    ]  # fmt: skip
    with pytest.raises(UserError, match="one image a caption"):
        plan(style, preset, "hps")
    with pytest.raises(UserError, match="needs 'include' of every caption, which caption 0"):
        plan(plain, preset, "geneval")
    with pytest.raises(UserError, match="did you mean 'geneval'"):
        plan(plain, preset, "genevl")


def test_geneval_layout_of_world_captions(script, model: Path, tmp_path: Path) -> None:
    words = ("--model", model, "--prompts", "world", "--limit", "3", "--layout", "geneval", *QUICK)
    assert script("generate", *words, "--output", tmp_path / "out").status == 0
    samples = read_folder(tmp_path / "out", captions=3)
    assert [sample.place for sample in samples] == [f"0000{i}/samples/00000.png" for i in range(3)]
    assert samples[0].metadata == load_prompts("world").prompts[0].metadata


def test_prompt_files(tmp_path: Path) -> None:
    table = tmp_path / "p.tsv"
    table.write_text('Prompt\tCategory\tChallenge\tNote\na "big" cat\tAnimals\tBasic\t\n"quoted\tb"\tArts\tBasic\tx\n')
    prompts = load_prompts(str(table)).prompts
    assert [prompt.text for prompt in prompts] == ['a "big" cat', "quoted\tb"]
    assert prompts[0].metadata == {"category": "Animals", "challenge": "Basic", "note": ""}
    (tmp_path / "u.csv").write_text('index,prompt_en,sub_dims_en\n0,a cat,"{""Testpoints"": [""Style""]}"\n')
    (prompt,) = load_prompts(str(tmp_path / "u.csv")).prompts
    assert prompt.metadata == {"index": "0", "sub_dims_en": {"Testpoints": ["Style"]}}
    styles = tmp_path / "hps"
    styles.mkdir()
    for name in ("anime", "concept-art", "paintings", "photo"):
        (styles / f"{name}.json").write_text('["a", "b"]')
    assert [p.metadata for p in load_prompts(str(styles)).prompts][2] == {"style": "concept-art", "index": 0}
    dense = tmp_path / "dpg"
    dense.mkdir()
    (dense / "12.txt").write_text("a long caption\n")
    assert load_prompts(str(dense)).prompts[0] == EvalPrompt("a long caption", {"item_id": "12"})
    assert len(load_prompts("geneval").prompts) == 553
    assert load_prompts("geneval").first(10).total == 553


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("partiprompts", "PartiPrompts.tsv of github.com/google-research/parti"),
        ("partiprompt", "did you mean 'partiprompts'"),
        ("./nowhere.txt", "there is no prompt file"),
        ("empty.txt", "holds no captions"),
        ("hole.jsonl", "caption 0 is empty"),
        ("list.json", "expected a list of captions"),
        ("bare.csv", "has no column of captions"),
        ("half", "lacks concept-art.json, paintings.json, photo.json"),
    ],
)
def test_prompt_sets_that_cannot_be_had(
    name: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").touch()
    Path("hole.jsonl").write_text('{"prompt": " "}\n')
    Path("list.json").write_text('{"a": 1}')
    Path("bare.csv").write_text("a,b\n1,2\n")
    Path("half").mkdir()
    Path("half/anime.json").write_text('["a"]')
    with pytest.raises(UserError, match=expected):
        load_prompts(name)
