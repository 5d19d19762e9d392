"""The bundled language model and its preferences are what their cards say."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from diffalign.bundled import bundled_path
from diffalign.text.data import BUNDLED_PREFERENCES, load_text_pairs
from diffalign.text.encode import TextEncoder
from diffalign.text.evaluation import writer_evaluator
from diffalign.text.loading import load_text_policy
from diffalign.text.rewards import judge_caption


@pytest.mark.parametrize("split", ["train", "tune", "test"])
def test_every_pair_is_one_right_and_one_wrong_caption(split: str) -> None:
    rows = pq.read_table(bundled_path(BUNDLED_PREFERENCES) / f"{split}.parquet").to_pylist()
    assert len(rows) > 200
    for row in rows:
        assert judge_caption(row["prompt"], row["chosen"]).correct
        wrong = judge_caption(row["prompt"], row["rejected"])
        assert not wrong.correct
        assert wrong.graded == pytest.approx(row["graded_rejected"])


def test_held_out_compositions_never_occur_in_training() -> None:
    folder = bundled_path(BUNDLED_PREFERENCES)
    asked = {s: pq.read_table(folder / f"prompts_{s}.parquet").to_pylist() for s in ("train", "tune", "test")}
    divided = {
        s: {r["composition"] for r in rows if r["kind"] in {"color_attr", "position"}} for s, rows in asked.items()
    }
    assert not divided["train"] & divided["test"]
    assert not divided["train"] & divided["tune"]
    assert not divided["tune"] & divided["test"]


def test_the_model_is_imperfect_and_all_pairs_fit_into_it() -> None:
    policy = load_text_policy("tiny-writer")
    assert sum(p.numel() for p in policy.module.parameters()) < 2_000_000
    assert 0.35 < writer_evaluator("tune", 100).evaluate(policy).mean < 0.75
    dataset = load_text_pairs("bundled")
    assert dataset.bundled
    assert len(TextEncoder(policy).precompute(dataset)) == len(dataset) > 2000
