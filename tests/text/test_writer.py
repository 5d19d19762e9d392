"""The writing task: requests and captions read back, every planted mistake is found."""

from __future__ import annotations

import random

import pytest
import torch
from rich.console import Console

from diffalign.errors import UserError
from diffalign.text.evaluation import TextEvaluation, compare_texts, writer_evaluator
from diffalign.text.observer import reward_table
from diffalign.text.rewards import caption_rewards, judge_caption
from diffalign.text.writer import meaning_of, read_caption, read_request
from diffalign.world.grammar import prompts
from train_scripts.world.language_model import careless_caption


@pytest.mark.parametrize("split", ["train", "tune", "test"])
def test_requests_and_captions_read_back(split: str) -> None:
    rng = random.Random(0)
    for record in prompts(split, 200, 3):  # type: ignore[arg-type]
        meaning = meaning_of(record, rng)
        assert read_request(meaning.request()) == meaning
        assert read_caption(meaning.caption()) == meaning
        world = read_caption(record.text)
        assert world is not None
        assert world.canonical == meaning.canonical
        assert judge_caption(meaning.request(), record.text).graded == 1.0


def test_planted_mistakes_are_found() -> None:
    rng = random.Random(1)
    for record in prompts("train", 400, 4):
        meaning = meaning_of(record, rng)
        verdict = judge_caption(meaning.request(), careless_caption(meaning, rng))
        assert not verdict.correct
        assert verdict.graded < 1
        assert verdict.reason


@pytest.mark.parametrize(
    ("caption", "reason"),
    [
        ("a photo of a red circle and a blue star", ""),
        ("a photo of a blue star and a red circle", ""),
        ("a photo of a red circle", "no star is named"),
        ("a photo of a red circle and a star", "the star has another colour"),
        ("a photo of a red circle and two blue stars", "the star has another count"),
        ("a photo of a red circle and a blue star and a cross", "something else is named"),
        ("a photo of a red circle left of a blue star", "the relation is another"),
        ("a photo of an red circle and a blue star", "the caption is not well-formed"),
        ("red circle and blue star", "the caption is not well-formed"),
        ("a photo of a red circle and", "the caption is not well-formed"),
        ("", "the caption is not well-formed"),
    ],
)
def test_verdicts_have_reasons(caption: str, reason: str) -> None:
    verdict = judge_caption("red circle , blue star :", caption)
    assert (verdict.correct, verdict.reason) == (not reason, reason)


def test_mirrored_relations_mean_the_same() -> None:
    assert judge_caption("star left of red cross :", "a photo of a red cross right of a star").correct
    assert not judge_caption("star left of red cross :", "a photo of a red cross left of a star").correct
    assert not judge_caption("star left of red cross :", "a photo of a star and a red cross").correct


def test_what_is_no_request_is_refused() -> None:
    with pytest.raises(UserError, match="no request"):
        judge_caption("draw a cat", "a photo of a star")


def test_held_out_requests_are_distinct_and_drawn_by_seed() -> None:
    first, again, other = (writer_evaluator("test", 400, seed) for seed in (0, 0, 1))
    assert list(first.prompts) == list(again.prompts)
    assert list(first.prompts) != list(other.prompts)
    assert len(set(first.prompts)) == 400
    assert torch.equal(first.seeds, again.seeds)


def test_comparison_is_paired() -> None:
    kinds = ["colors", "position"] * 50
    before = torch.tensor([0.0, 1.0] * 50)
    after = before.clone()
    after[::4] = 1.0
    comparison = compare_texts(TextEvaluation([""] * 100, before, kinds), TextEvaluation([""] * 100, after, kinds))
    assert comparison.gain.value == pytest.approx(0.25)
    assert 0.1 < comparison.gain.low < 0.25 < comparison.gain.high < 0.4
    assert comparison.win_rate.value == pytest.approx(0.625)
    start = TextEvaluation([""] * 100, before, kinds)
    console = Console(record=True)
    console.print(reward_table(compare_texts(start, start), start, start))
    assert "all 100 tied" in console.export_text()
    assert TextEvaluation([""] * 100, after, kinds).by_kind() == {"colors": 0.5, "position": 1.0}
    assert caption_rewards(["star :", "star :"], ["a photo of a star", "star"]).tolist() == [1.0, 0.0]
