"""Images sampled for people: reproduced from their seeds, whatever the policy has learned meanwhile."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.batch import ImageBatch
from diffalign.data.encode import ImageEncoder
from diffalign.data.load import load_examples
from diffalign.data.loader import MicroBatch
from diffalign.errors import UserError
from diffalign.references import AdaptersOff
from diffalign.rollouts.labelled import as_sampled, write_samples
from diffalign.rollouts.transitions import TransitionBatch
from diffalign.strategies.base import Context
from diffalign.strategies.d3po import D3PO, D3POConfig
from tests.factories import ToyPolicy

CONFIG = D3POConfig(
    images_per_prompt=3, rollout_steps=3, rollout_guidance_scale=2.0, labelled=True, updates_per_rollout=1,
    transitions_per_pass=1000,
)  # fmt: skip
SCORES = [[0.0, -1.0, 0.0], [-0.5, 0.0, -0.5]]
"""Of three images tagged by annotators: minus the share of them that found a defect."""


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    table = write_samples(ToyPolicy(adapter=False), ["a b", "a b"], CONFIG, 0, tmp_path)
    rows = [json.loads(line) for line in table.read_text().splitlines()]
    exported = tmp_path / "labels.jsonl"
    exported.write_text("".join(json.dumps({**r, "scores": s}) + "\n" for r, s in zip(rows, SCORES, strict=True)))
    return exported


def batch_of(policy: ToyPolicy, path: Path) -> ImageBatch:
    examples = load_examples(path, "prompts").examples
    assert len(examples) == 2  # one caption, two groups of images
    return ImageEncoder(policy, "prompts")(MicroBatch(tuple(examples), torch.arange(2)))


def test_a_moved_policy_learns_from_the_labelled_trajectories(labels: Path) -> None:
    policy, strategy = ToyPolicy(), D3PO(CONFIG)
    policy.module.delta["default"].data += 0.3
    ctx = Context(policy, AdaptersOff(policy))
    strategy.build(ctx)
    (update,) = strategy.collect(ctx, [batch_of(policy, labels)])
    assert ctx.progress.images == 2 * CONFIG.images_per_prompt  # also where the reference samples
    (batch,) = update.micro_batches
    assert isinstance(batch, TransitionBatch)
    assert batch.transitions is not None
    assert update.weight == 2 * 3 * 3  # captions x pairs x steps, ties included
    assert batch.size == 4 * 3  # pairs that somebody has decided
    better = batch.fields["signs"][:, 0] > 0
    ends = batch.transitions.steps[: batch.size] == 2
    pictures = policy.decode(batch.transitions.read().after)
    for index, name in enumerate(("00000-0.png", "00000-1.png")):  # the first decided pair: image 0 is preferred
        shown = np.asarray(Image.open(labels.parent / name)) / 255
        row = int(ends.nonzero()[0]) + index * batch.size
        assert np.abs(pictures[row].permute(1, 2, 0).numpy() - shown).max() < 0.5 / 255 + 1e-6
    assert better[ends].tolist() == [True, False, False, True]


def test_other_settings_and_rows_without_labels_are_refused(labels: Path, tmp_path: Path) -> None:
    batch = batch_of(ToyPolicy(), labels)
    with pytest.raises(UserError, match="set --rollout_steps"):
        as_sampled(batch, replace(CONFIG, rollout_steps=4))
    with pytest.raises(UserError, match="holds no labels"):
        as_sampled(replace(batch, metadata=[]), CONFIG)
    with pytest.raises(UserError, match="choose another folder"):
        write_samples(ToyPolicy(), ["a b"], CONFIG, 0, tmp_path)
