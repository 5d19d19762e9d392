"""Caches: keys hold what changes the tensor and nothing else; shards are whole or absent."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from diffalign.batch import Condition
from diffalign.data.cache import LatentCache, LatentKey, PromptCache, PromptKey, TensorStore
from diffalign.errors import UserError

KEY = LatentKey("hash", "vae", (8, 8), (8, 12), (0, 2), False, torch.float32)


def test_the_fields_of_a_latent_key_are_these_and_no_others():
    # Another field would make everybody encode again: think twice.
    assert [f.name for f in fields(LatentKey)] == [
        "image", "encoder", "resolution", "resized", "crop", "flip", "dtype",
    ]  # fmt: skip
    assert [f.name for f in fields(PromptKey)] == ["prompt", "encoder", "dtype"]


def test_the_names_of_stored_tensors_do_not_change_between_versions():
    assert KEY.digest() == "c9bdf44e34ba7bcfbb372dce0b428cc0"
    others = [
        replace(KEY, image="other"), replace(KEY, encoder="other"), replace(KEY, resolution=(8, 16)),
        replace(KEY, resized=(8, 13)), replace(KEY, crop=(0, 3)), replace(KEY, flip=True),
        replace(KEY, dtype=torch.float16),
    ]  # fmt: skip
    assert len({key.digest() for key in [KEY, *others]}) == 8


def test_latents_come_back_in_the_type_of_their_key():
    cache = LatentCache()
    latents = torch.randn(3, 4, 4, generator=torch.Generator().manual_seed(0))
    half = replace(KEY, dtype=torch.float16)
    assert KEY not in cache
    cache.put(KEY, latents)
    cache.put(half, latents)
    assert torch.equal(cache.get(KEY), latents)
    assert torch.equal(cache.get(half), latents.half())


def test_captions_come_back_in_any_order_and_number():
    cache = PromptCache()
    keys = [PromptKey(text, "clip", torch.float32) for text in ("a", "b")]
    cache.put(keys, Condition({"embeds": torch.tensor([[1.0], [2.0]]), "mask": torch.tensor([[1], [0]])}))
    condition = cache.get([keys[1], keys[0], keys[1]])
    assert condition.tensors["embeds"].flatten().tolist() == [2, 1, 2]
    assert condition.tensors["mask"].dtype == torch.int64


def test_what_was_written_is_found_again(tmp_path):
    store = TensorStore(tmp_path, shard_bytes=100)
    for index in range(10):
        store.put(f"key{index}", {"a": torch.full((5,), float(index)), "b": torch.tensor(index)})
    store.flush()
    assert len(list(tmp_path.glob("shard-*.safetensors"))) > 1
    again = TensorStore(tmp_path)
    assert len(again) == 10
    assert again.get("key7")["a"].tolist() == [7.0] * 5
    assert again.get("key7")["b"].item() == 7


def test_a_second_process_sees_the_shards_of_the_first(tmp_path):
    first, second = TensorStore(tmp_path), TensorStore(tmp_path)
    first.put("key", {"a": torch.ones(1)})
    first.flush()
    assert "key" not in second
    second.refresh()
    assert "key" in second


def test_a_shard_that_was_cut_off_is_ignored_and_named(tmp_path):
    store = TensorStore(tmp_path)
    store.put("whole", {"a": torch.ones(100)})
    store.flush()
    store.put("cut", {"a": torch.ones(100)})
    store.flush()
    cut = next(p for p in tmp_path.glob("shard-*") if b"cut/a" in p.read_bytes())
    cut.write_bytes(cut.read_bytes()[:-40])
    again = TensorStore(tmp_path)
    assert "whole" in again
    assert "cut" not in again
    assert again.unreadable == [cut]


def test_a_full_disk_gives_one_message_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def no_space(*_):
        raise OSError(28, "No space left on device")

    store = TensorStore(tmp_path)
    store.put("key", {"a": torch.ones(1)})
    monkeypatch.setattr("diffalign.data.cache.save_file", no_space)
    with pytest.raises(UserError, match=r"cannot write the cache.*No space left.*--cache_dir"):
        store.flush()
    assert list(tmp_path.iterdir()) == []
    assert "key" in store


def test_a_stored_row_does_not_keep_its_batch_alive():
    batch = torch.zeros(100, 8)
    store = TensorStore()
    store.put("key", {"a": batch[0]})
    assert store.get("key")["a"].untyped_storage().nbytes() == 8 * 4
