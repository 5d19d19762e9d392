"""The hash of a scorer's weights."""

from __future__ import annotations

from pathlib import Path

import torch

from diffalign.rewards.combine import WeightedSum
from diffalign.rewards.identity import weights_hash
from diffalign.rewards.loading import load_reward
from diffalign.rewards.pickscore import PickScore
from tests.rewards.support import Brightness


def test_the_hash_names_the_weights() -> None:
    proxy = PickScore.load("tiny-pickscore")
    first = weights_hash(proxy)
    assert first is not None
    assert first == weights_hash(PickScore.load("tiny-pickscore"))
    proxy.score(torch.zeros(1, 3, 64, 64), ["a photo of a star"])
    assert weights_hash(proxy) == first, "captions that were embedded meanwhile are no weights"
    with torch.no_grad():
        next(proxy.towers.model.parameters()).view(-1)[0] += 1
    assert weights_hash(proxy) != first


def test_wrappers_are_looked_into_and_rules_have_none() -> None:
    assert weights_hash(load_reward("verifier")) is None
    assert weights_hash(Brightness()) is None
    both = WeightedSum(
        {"a": load_reward("tiny-pickscore"), "b": load_reward("incompressibility")}, {"a": 1.0, "b": 1.0}
    )
    assert weights_hash(both) is not None


def test_files_of_other_runtimes_count(tmp_path: Path) -> None:
    reward = Brightness()
    hashes = []
    for content in (b"one", b"two"):
        (tmp_path / "net.onnx").write_bytes(content)
        reward.weights_files = (tmp_path / "net.onnx",)
        hashes.append(weights_hash(reward))
    assert None not in hashes
    assert hashes[0] != hashes[1]
