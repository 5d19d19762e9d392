"""A cell's key changes with what its run reads and imports, and with nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from diffalign.bundled import assets_root
from diffalign.errors import UserError
from diffalign.evaluation.leaderboard import imports, keys
from diffalign.evaluation.leaderboard.entries import STARTS, TINY_SD, TINY_SD3, BoardSettings, Cell, Entry, entries
from diffalign.evaluation.leaderboard.keys import assets_hash, cell_key, code_modules
from diffalign.training.resolve import resolve_defaults

DDPO = Entry("ddpo")
MODULES = {
    "chosen": "from diffalign import shared\n",
    "other": "from diffalign import shared\n",
    "shared": "def lazy():\n    from diffalign.inner import deep\n",
    "inner.deep": "if TYPE_CHECKING:\n    import diffalign.other\n",
}


@pytest.fixture
def sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A small package in place of the real one."""
    for name, text in MODULES.items():
        path = tmp_path / f"{name.replace('.', '/')}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(imports, "_ROOT", tmp_path)
    forget()
    yield tmp_path
    forget()


def forget() -> None:
    for cached in (imports._imports, imports._meaning, keys._hash_files):
        cached.cache_clear()


@pytest.mark.parametrize(
    ("file", "text", "matters"),
    [
        ("chosen.py", "ADDED = 1\n", True),
        ("shared.py", "ADDED = 1\n", True),
        ("inner/deep.py", "ADDED = 1\n", True),  # imported inside a function
        ("other.py", "ADDED = 1\n", False),
        ("chosen.py", "# a remark\n", False),
    ],
)
def test_only_what_is_imported_counts(sources: Path, file: str, text: str, matters: bool) -> None:
    def hashed() -> str:
        forget()
        return imports.source_hash(imports.imported_modules(["diffalign.chosen"]))

    before = hashed()
    (sources / file).write_text((sources / file).read_text() + text)
    assert (hashed() != before) == matters


def test_docstrings_do_not_count(sources: Path) -> None:
    (sources / "chosen.py").write_text('"""One."""\ndef f():\n    """Two."""\n')
    before = imports.source_hash(["diffalign.chosen"])
    (sources / "chosen.py").write_text('"""Three."""\ndef f():\n    """Four."""\n')
    forget()
    assert imports.source_hash(["diffalign.chosen"]) == before
    with pytest.raises(ValueError, match="no module"):
        imports.imported_modules(["diffalign.absent"])


def test_modules_of_a_run() -> None:
    start, ddpo, flow = (code_modules(entry) for entry in (Entry(None), DDPO, Entry("flow_grpo", TINY_SD3)))
    measured = {f"diffalign.{name}" for name in ("policies.unet", "diffusion.sampling", "world.verifier")}
    trained = {f"diffalign.{name}" for name in ("strategies.ddpo", "strategies.on_policy", "rollouts.rollout")}
    trained |= {"diffalign.training.loop", "diffalign.data.bundled", "diffalign.diffusion.discrete"}
    assert start >= measured
    assert not start & trained - {"diffalign.diffusion.discrete"}
    assert ddpo >= measured | trained
    assert "diffalign.policies.sd3" in flow - ddpo
    assert "diffalign.policies.unet" in ddpo - flow
    assert not {f"diffalign.{name}" for name in ("strategies.dro", "strategies.prdp", "rewards.hpsv3")} & (ddpo | flow)
    assert not [name for name in ddpo | flow if ".text." in name or ".label" in name or "leaderboard" in name]


@pytest.mark.parametrize(
    ("file", "start", "method"),
    [
        ("tiny-sd/unet/diffusion_pytorch_model.safetensors", True, True),
        ("tiny-pickscore/config.json", True, True),
        ("preferences/pairs.parquet", False, True),
        ("preferences/README.md", False, False),
        ("another-model/weights.safetensors", False, False),
    ],
)
def test_only_bundled_files_that_a_run_reads_count(
    file: str, start: bool, method: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tiny-sd", "tiny-pickscore", "preferences"):
        for path in (p for p in (assets_root() / name).rglob("*") if p.is_file()):
            copy = tmp_path / path.relative_to(assets_root())
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.name.encode())
    monkeypatch.setattr(keys, "bundled_path", lambda name: tmp_path / name)
    forget()
    before = assets_hash(Entry(None)), assets_hash(DDPO)
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_bytes(b"other bytes")
    forget()
    assert (assets_hash(Entry(None)) != before[0], assets_hash(DDPO) != before[1]) == (start, method)
    forget()


def test_settings_seeds_and_options_are_in_the_key() -> None:
    settings = BoardSettings(captions=4)
    found = {
        cell_key(Cell("ddpo"), settings),
        cell_key(Cell("ddpo", 1), settings),
        cell_key(Cell("ddpo_10x"), settings),
        cell_key(Cell("ddpo"), replace(settings, test_prompt_seed=7)),
    }
    assert len(found) == 4


def test_rows_of_the_board() -> None:
    rows = entries()
    assert rows["sft"].draws == rows["best_of_4"].draws == rows["diffusion_dpo"].draws == 1
    assert {name for name, row in rows.items() if row.draws == 2} >= {
        "base",
        "base_sd3",
        "ddpo",
        "seppo",
        "dro",
        "refl",
    }
    assert rows["ddpo"].rewards == {"graded": 1.0}
    assert rows["ddpo_pickscore"].rewards == rows["seppo"].rewards == {"tiny-pickscore": 1.0}
    assert rows["parrot"].rewards == {"graded": 1.0, "tiny-pickscore": 1.0}
    assert rows["sft"].rewards == rows["base"].rewards == {}
    assert (rows["flow_grpo"].model, rows["flow_grpo"].base) == (TINY_SD3, "base_sd3")
    assert all(row.model == TINY_SD for name, row in rows.items() if "sd3" not in name and "grpo" not in name)
    assert "reno" not in rows
    measured = BoardSettings().of(rows["pref_grpo"])
    assert (measured["model"], measured["guidance_scale"]) == (TINY_SD3, STARTS[TINY_SD3].guidance_scale)


def test_ten_times_the_learning_rate_is_that_of_the_preset() -> None:
    for name in ("ddpo", "prdp"):
        assert entries()[f"{name}_10x"].config(3).optim.learning_rate == pytest.approx(
            10 * resolve_defaults(name, TINY_SD)["learning_rate"]
        )
    assert entries()["ddpo"].config(3).optim.seed == 3


@pytest.mark.parametrize(("text", "complaint"), [("spt:0", "sft"), ("sft:zero", "METHOD:SEED"), ("reno:0", "row")])
def test_mistyped_cells(text: str, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        Cell.parse(text)
    assert Cell.parse("prdp_10x:2") == Cell("prdp_10x", 2)
