"""Checkpoints are whole or absent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.training import checkpoint as module
from diffalign.training.checkpoint import (
    BrokenCheckpoint,
    find_checkpoint,
    find_together,
    list_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from diffalign.training.processes import Processes
from diffalign.training.state_files import pack, unpack

WEIGHTS = {"layer.a": torch.arange(6.0).reshape(2, 3), "layer.b": torch.tensor([1.5], dtype=torch.float64)}
STATE = {
    "stepper": {"optimizer": {0: {"step": torch.tensor(3.0), "exp_avg": torch.ones(2, 3)}}},
    "source": {"epoch": 1},
}


def save(root: Path, step: int, keep: int = 0) -> Path:
    return save_checkpoint(root, step, WEIGHTS, STATE, keep)


def test_round_trip(tmp_path: Path) -> None:
    read = read_checkpoint(save(tmp_path, 7))
    assert read.step == 7
    assert all(torch.equal(read.weights[name], value) for name, value in WEIGHTS.items())
    assert read.weights["layer.b"].dtype == torch.float64
    assert torch.equal(read.state["stepper"]["optimizer"]["0"]["exp_avg"], torch.ones(2, 3))
    assert read.state["source"] == {"epoch": 1}


def test_contents_are_the_documented_list(tmp_path: Path) -> None:
    names = {path.name for path in save(tmp_path, 1).iterdir()}
    assert names == {"weights.safetensors", "state.safetensors", "state.json", "manifest.json"}


def test_oldest_are_removed(tmp_path: Path) -> None:
    for step in (1, 2, 10, 11):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000010", "step-00000011"]


def test_a_continuation_that_was_given_up_is_removed(tmp_path: Path) -> None:
    """A run is continued from step 1 though it went on to step 3: its new checkpoint is the latest one from then on."""
    for step in (1, 2, 3):
        save(tmp_path, step, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]
    for keep in (1, 2, 0):
        save(tmp_path, 2, keep)
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002"]
    assert find_checkpoint("latest", tmp_path)[0].step == 2


@pytest.mark.parametrize("name", ["weights.safetensors", "state.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "altered"])
def test_every_damage_is_noticed(name: str, damage: str, tmp_path: Path) -> None:
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(BrokenCheckpoint, match=name):
        read_checkpoint(path.parent)
    found, remarks = find_checkpoint("latest", tmp_path)
    assert found.step == 1
    assert len(remarks) == 1
    assert name in remarks[0]


def test_no_space_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    write = module.save_file

    def full(tensors: Any, path: Path, *rest: Any) -> None:
        if path.name == "state.safetensors":
            raise OSError(28, "No space left on device")
        write(tensors, path, *rest)

    monkeypatch.setattr(module, "save_file", full)
    with pytest.raises(UserError, match="No space left on device"):
        save(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert read_checkpoint(tmp_path / "step-00000001").step == 1


def test_a_half_written_folder_is_no_checkpoint(tmp_path: Path) -> None:
    whole = save(tmp_path, 1)
    whole.rename(tmp_path / ".step-00000002.tmp")
    with pytest.raises(UserError, match="nothing to resume from"):
        find_checkpoint("latest", tmp_path)
    save(tmp_path, 2)  # and it does not disturb the next attempt
    assert find_checkpoint("latest", tmp_path)[0].step == 2


class Beside(Processes):
    """Rank 0 or 1 of two processes whose other one has been told what rank 0 found, or why nothing."""

    def __init__(self, rank: int, told: Any = None) -> None:
        self._rank, self._told = rank, told

    rank = property(lambda self: self._rank)  # type: ignore[assignment]
    is_main = property(lambda self: self._rank == 0)  # type: ignore[assignment]

    def exchange(self, value: Any) -> list[Any]:
        return [value if self.is_main else self._told, None]

    def on_main(self, work: Any) -> Any:
        return work() if self.is_main else None


def test_one_process_checks_what_all_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save(tmp_path, 3)
    hashed: list[Path] = []
    monkeypatch.setattr(module, "_hash", lambda path, hash=module._hash: hashed.append(path) or hash(path))
    first, _ = find_together("latest", tmp_path, Beside(0))
    assert len(hashed) == 3
    second, remarks = find_together("latest", tmp_path, Beside(1, first.folder))
    assert (len(hashed), second.step, second.folder, remarks) == (3, 3, folder, [])
    assert all(torch.equal(second.weights[name], value) for name, value in first.weights.items())
    with pytest.raises(UserError, match=r"process 1 cannot read the checkpoint: .*; all must share the disk"):
        find_together("latest", tmp_path, Beside(1, tmp_path / "elsewhere"))


def test_a_named_checkpoint_must_be_whole(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    (folder / "state.json").unlink()
    with pytest.raises(UserError, match=r"state\.json is missing"):
        find_checkpoint(str(folder), tmp_path)
    with pytest.raises(UserError, match="there are: step-00000001"):
        find_checkpoint(str(tmp_path / "step-9"), tmp_path)


def test_manifest_of_another_format_is_refused(tmp_path: Path) -> None:
    folder = save(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))
    with pytest.raises(BrokenCheckpoint, match="format 99"):
        read_checkpoint(folder)


def test_unsaveable_state_is_named(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="/strategy/table is a set"):
        save_checkpoint(tmp_path, 1, WEIGHTS, {"strategy": {"table": {1, 2}}}, 0)


PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
TREES = st.recursive(
    PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3), max_leaves=8
)


@settings(deadline=None, max_examples=30)
@given(TREES)
def test_plain_values_survive_json(tree: Any) -> None:
    packed, tensors = pack(tree)
    assert unpack(json.loads(json.dumps(packed)), tensors) == tree


def test_tensors_that_share_memory_are_kept_apart(tmp_path: Path) -> None:
    base = torch.arange(4.0)
    folder = save_checkpoint(tmp_path, 1, {"a": base[:3], "b": base[1:], "c": base}, {}, 0)
    read = read_checkpoint(folder)
    assert torch.equal(read.weights["b"], torch.tensor([1.0, 2.0, 3.0]))
