"""Pieces of the scripts that build the world: tokenizer, wrong pictures, resumable fitting, pairs of a list."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffalign.world.grammar import prompts, vocabulary
from diffalign.world.render import render
from train_scripts.world import cards
from train_scripts.world.fitting import FitSettings, batches, fit
from train_scripts.world.pictures import to_pictures, to_tensor
from train_scripts.world.preferences import PAIR_MARGIN, as_list, lossless, pairs_of, rank
from train_scripts.world.proxy import contrast, patch_labels
from train_scripts.world.spoiled import bend, blend, patch, spoil_meaning
from train_scripts.world.text import MAX_LENGTH, build_tokenizer, learn_merges


def test_every_word_is_one_token_and_every_caption_fits():
    tokenizer = build_tokenizer()
    for split in ("train", "test"):
        for record in prompts(split, 100, 0):
            ids = tokenizer(record.text).input_ids
            assert len(ids) == len(record.text.split()) + 2 <= MAX_LENGTH
            assert tokenizer.decode(ids, skip_special_tokens=True).strip() == record.text
    assert tokenizer.unk_token_id not in tokenizer("zebra!").input_ids[1:-1]


def test_merges_are_the_same_each_time_and_reach_every_word():
    merges = learn_merges(vocabulary())
    assert merges == learn_merges(vocabulary())
    made = {"".join(pair) for pair in merges}
    assert all(word + "</w>" in made for word in vocabulary() if len(word) > 1)


def test_a_spoiled_meaning_differs_and_leaves_the_original():
    rng = random.Random(0)
    for record in prompts("train", 200, 0):
        before = json.dumps(record.metadata)
        changed = spoil_meaning(record.metadata, rng)
        assert json.dumps(record.metadata) == before
        assert changed["include"] != record.metadata["include"]


def test_deformed_pictures_differ_but_keep_their_form():
    record = prompts("train", 1, 3)[0]
    rng = random.Random(1)
    picture, other = render(record.metadata, rng), render(record.metadata, rng)
    for wrong in (bend(picture, rng), blend(picture, other), patch(picture, other, rng)):
        assert wrong.shape == picture.shape
        assert wrong.dtype == np.uint8
        assert not np.array_equal(wrong, picture)


def test_pictures_survive_the_way_to_tensors_and_back():
    picture = render(prompts("train", 1, 0)[0].metadata, random.Random(2))
    assert np.array_equal(to_pictures(to_tensor([picture]))[0], picture)


def quadratic_fit(folder, steps, stop=None):
    module = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(module.weight)

    def loss(step, generator):
        if step == stop:
            raise KeyboardInterrupt
        return (module.weight - torch.randn(1, 3, generator=generator)).square().sum()

    settings = FitSettings(steps=steps, learning_rate=0.1, warmup=2, save_every=4)
    fit("test", [module], loss, settings, folder)
    return module.weight.detach().clone()


def test_a_stopped_fit_continues_to_the_same_weights(tmp_path):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    whole = quadratic_fit(tmp_path / "whole", 12)
    with pytest.raises(KeyboardInterrupt):
        quadratic_fit(tmp_path / "stopped", 12, stop=9)
    assert torch.equal(quadratic_fit(tmp_path / "stopped", 12), whole)


def test_learning_rate_rises_then_falls_to_its_floor():
    settings = FitSettings(steps=100, learning_rate=1.0, warmup=10)
    rates = [settings.rate(step) for step in range(101)]
    assert rates[0] < rates[5] < rates[9]
    assert rates[20] > rates[60] > rates[100]
    assert rates[100] == pytest.approx(settings.floor)
    assert replace(settings, floor=1.0).rate(100) == pytest.approx(1.0)


def test_batches_cover_everything_once():
    rows = [i for part in batches(10, 4) for i in range(part.start, part.stop)]
    assert rows == list(range(10))


def row(name, proxy, verifier, graded):
    return {
        "image_id": name, "prompt_id": "p", "prompt": "a photo of a star", "proxy": proxy, "verifier": verifier,
        "graded": graded,
    }  # fmt: skip


def test_pairs_have_a_margin_and_never_contradict_the_verifier():
    group = rank(
        [row("b", 2.0, False, 0.5), row("a", 3.0, True, 1.0), row("c", 1.9, False, 0.75), row("d", 9.0, False, 0.2)]
    )
    assert [r["image_id"] for r in group] == ["d", "a", "b", "c"]
    assert as_list(group)["images"] == ["d", "a", "b", "c"]
    pairs = pairs_of(group)
    assert [(p["image_w"], p["image_l"]) for p in pairs] == [("a", "b"), ("a", "c")]
    assert all(p["proxy_margin"] >= PAIR_MARGIN and p["graded_margin"] >= 0 for p in pairs)


def test_stored_pictures_are_lossless():
    from io import BytesIO

    from PIL import Image

    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    assert np.array_equal(np.asarray(Image.open(BytesIO(lossless(picture)))), picture)


def test_contrastive_loss_is_small_when_true_pictures_win_and_ignores_repeated_captions():
    records = prompts("train", 3, 0)
    logits = torch.full((3, 9), -20.0)
    logits[range(3), range(3)] = 20.0
    assert contrast(logits, records) < 1e-4
    repeated = [records[0], records[0], records[1]]
    logits[0, 1] = 20.0  # the other true picture of the same caption
    assert contrast(logits, repeated) < contrast(logits, records)


def test_patches_under_an_object_carry_its_label():
    from diffalign.world.render import Placed

    labels = patch_labels([Placed("circle", "red", (20.0, 44.0), 10.0)]).view(8, 8)
    assert labels[5, 2] == 1
    assert labels[0, 7] == 0


def test_cards_show_figures():
    figures = {"tiny-sd": {"steps": 15, "guidance_scale": 5.0, "correct": 0.5, "graded": 0.75, "counting": 0.4}}
    assert "| correct | 0.500 |" in cards.table(figures["tiny-sd"])
    assert "tiny-sd | 15 | 5.000 | 0.500 | 0.750" in cards.scores(figures)
    assert cards.table({}) == ""
    page = cards.with_figures(f"top {cards.MARK} old {cards.MARK} end", {**figures, "vae": {"accepted": 0.9}})
    assert page.startswith("top ")
    assert page.endswith(" end")
    assert "old" not in page
    assert "| accepted | 0.900 |" in page
