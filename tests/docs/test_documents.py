"""What the documents tell a reader to type works as written."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import diffalign
from diffalign.cli.main import main
from diffalign.strategies import registry
from diffalign.training import api
from tests.data.support import write_images, write_jsonl
from tests.docs.documents import SHORT, blocks, commands, run_document, words_of

ROOT = Path(__file__).resolve().parents[2]
EXECUTED = (
    "README.md",
    "docs/tutorial.md",
    "docs/adding_a_method.md",
    "docs/evaluation.md",
    "docs/reports.md",
    "docs/on_policy.md",
    "docs/reward_hacking.md",
    "docs/recipes.md",
    "docs/migrating.md",
)
PARSED = ("docs/recipes.md", "docs/text.md", "docs/scaling.md", "docs/labelling.md")
WITHOUT_RUNS = ("docs/noise_optimisation.md",)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reader's folder; a method that a document registers is forgotten afterwards."""
    monkeypatch.chdir(tmp_path)
    registry.list_methods()  # all are found before the table is exchanged
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    train = api.train

    def short(dataset: Any = None, **options: Any) -> Any:
        return train(dataset, **{**options, **SHORT})

    monkeypatch.setattr(diffalign, "train", short, raising=False)
    write_images(tmp_path, [f"{index}.png" for index in range(6)])
    rows = [{"prompt": f"a {i}", "images": [f"{2 * i}.png", f"{2 * i + 1}.png"], "winner": 0} for i in range(3)]
    write_jsonl(tmp_path / "my_pairs.jsonl", rows)
    return tmp_path


@pytest.mark.parametrize("name", EXECUTED)
def test_a_document_works_as_written(name: str, folder: Path) -> None:
    assert run_document((ROOT / name).read_text(), folder) > 0
    runs = list(folder.rglob("config.yaml"))
    assert runs
    weights = ("pytorch_lora_weights.safetensors", "model_index.json")  # adapters, or all weights
    assert all(any((run.parent / name).is_file() for name in weights) for run in runs)


@pytest.mark.parametrize("name", WITHOUT_RUNS)
def test_a_document_that_trains_nothing_works_as_written(name: str, folder: Path) -> None:
    assert run_document((ROOT / name).read_text(), folder) > 1


@pytest.mark.parametrize("name", PARSED)
def test_trainings_of_other_documents_have_known_options(name: str, folder: Path) -> None:
    """Their runs take several processes, other data or minutes, so options are read and nothing runs."""
    code = [block.text for block in blocks((ROOT / name).read_text()) if block.language in ("bash", "text")]
    found = [words_of(command) for text in code for command in commands(text) if " train_scripts/" in command]
    assert found
    for words in found:
        assert words is not None
        with pytest.raises(SystemExit) as stop:
            main([*words, "--print_config"])
        assert stop.value.code == 0, words


def test_the_rule() -> None:
    text = "Now save it as `x.py`:\n\n```python\na = 1\n```\n\n```text\nno\n```\n"
    assert [(b.language, b.saved_as) for b in blocks(text)] == [("python", "x.py"), ("text", None)]
    assert commands("# first\na \\\n  --b && c\n") == ["a --b", "c"]
    words = words_of("accelerate launch --cpu --num_processes 2 train_scripts/train_text.py --method simpo")
    assert words is not None
    assert words[:3] == ["train-text", "--method", "simpo"]
    assert "--max_train_steps=2" in words
    assert words_of("accelerate launch train_scripts/train.py --method inpo --help") == [
        "train", "--method", "inpo", "--help",
    ]  # fmt: skip
    assert words_of("ls -l") is None


def test_the_page_of_methods_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    expected = printed("page", capsys)
    assert (ROOT / "docs" / "methods.md").read_text() == expected, "diffalign methods --format page > docs/methods.md"


def test_the_table_of_the_readme_is_up_to_date(capsys: pytest.CaptureFixture[str]) -> None:
    between = re.search(r"<!-- methods:begin -->\n(.*?)<!-- methods:end -->", (ROOT / "README.md").read_text(), re.S)
    assert between is not None
    assert between[1] == printed("readme", capsys), (
        "put what `diffalign methods --format readme` prints between the marks"
    )


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT) for path in ROOT.glob("*.md")), ids=str)
def test_links_of_the_front_pages_lead_somewhere(page: Path) -> None:
    follow(page)


@pytest.mark.parametrize("page", sorted(path.relative_to(ROOT) for path in ROOT.glob("docs/*.md")), ids=str)
def test_links_of_the_documents_lead_somewhere(page: Path) -> None:
    follow(page)


def test_named_tests_and_modules_exist() -> None:
    """The table of requirements names files; each must be there."""
    text = (ROOT / "docs" / "requirements.md").read_text()
    named = re.findall(r"`((?:tests|diffalign|eval|train_scripts|docs|benchmarks)/[\w./-]+)(?:::(\w+))?`", text)
    assert len(named) > 40
    for path, test in named:
        assert (ROOT / path).exists(), path
        assert not test or f"def {test}(" in (ROOT / path).read_text(), f"{path}::{test}"


def printed(form: str, capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["methods", "--format", form]) == 0
    return capsys.readouterr().out


def follow(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http", "#", "mailto:")):
            assert ((ROOT / page).parent / target.split("#")[0]).exists(), f"{page} links to {target}"
