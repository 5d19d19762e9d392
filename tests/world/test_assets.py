"""What lies in the bundled assets: stock libraries load it, and it holds what the cards say."""

from __future__ import annotations

import json
from io import BytesIO

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from diffalign.bundled import assets_root, bundled_names, bundled_path, is_bundled
from diffalign.errors import UserError
from diffalign.world.grammar import split_of
from diffalign.world.verifier import verify

MODELS = [name for name in ("tiny-sd", "tiny-sd3", "tiny-sd-turbo") if is_bundled(name)]


def read(*parts):
    return pq.read_table(bundled_path("preferences").joinpath(*parts)).to_pylist()


def test_the_essentials_are_bundled_and_an_unknown_name_is_answered_with_the_nearest():
    assert {"tiny-sd", "tiny-pickscore", "preferences"} <= set(bundled_names())
    with pytest.raises(UserError, match="tiny-sd"):
        bundled_path("tiny-ds")


def test_assets_are_small_and_hold_neither_links_nor_pickles():
    files = [path for path in assets_root().rglob("*") if not path.is_dir()]
    assert not any(path.is_symlink() for path in files)
    assert not any(path.suffix in {".bin", ".pt", ".pth", ".pkl", ".ckpt"} for path in files)
    assert sum(path.stat().st_size for path in files) < 40e6


@pytest.mark.parametrize("name", bundled_names())
def test_every_asset_has_a_card(name):
    assert len((bundled_path(name) / "README.md").read_text()) > 200


@pytest.mark.parametrize("name", MODELS)
def test_stock_pipelines_load_and_draw(name):
    from diffusers import DiffusionPipeline

    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "tiny-sd3" else {}
    pipeline = DiffusionPipeline.from_pretrained(bundled_path(name), **absent)
    pipeline.set_progress_bar_config(disable=True)
    steps, guidance = (1, 0.0) if name.endswith("turbo") else (2, 4.0)
    picture = pipeline(
        "a photo of a red circle",
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    assert picture.shape == (64, 64, 3)
    assert np.isfinite(picture).all()


def test_latents_have_unit_deviation_and_decoding_keeps_the_truth():
    import random

    from diffusers import AutoencoderKL

    from train_scripts.world.pictures import rendered, to_pictures
    from train_scripts.world.vae import decode, encode

    vae = AutoencoderKL.from_pretrained(bundled_path("tiny-sd") / "vae")
    records, images = rendered(64, random.Random("test"))
    latents = encode(vae, images)
    assert (latents * vae.config.scaling_factor).std().item() == pytest.approx(1, abs=0.05)
    pictures = to_pictures(decode(vae, latents))
    accepted = [verify(p, r.metadata).correct for p, r in zip(pictures, records, strict=True)]
    assert np.mean(accepted) > 0.95


def test_preferences_refer_to_stored_pictures_of_their_own_caption():
    images = {row["image_id"]: row for row in read("images.parquet")}
    lists, pairs = read("lists.parquet"), read("pairs.parquet")
    assert len(images) == 4 * len(lists)
    for row in lists:
        assert len(set(row["images"])) == 4
        assert {images[key]["prompt"] for key in row["images"]} == {row["prompt"]}
        scores = [images[key]["proxy"] for key in row["images"]]
        assert scores == sorted(scores, reverse=True) == row["scores"]
    for row in pairs:
        winner, loser = images[row["image_w"]], images[row["image_l"]]
        assert winner["prompt"] == loser["prompt"] == row["prompt"]
        assert winner["proxy"] - loser["proxy"] >= 0.5
        assert winner["graded"] >= loser["graded"]
        assert winner["verifier"] >= loser["verifier"]


def test_preferences_keep_to_their_splits():
    for split, parts in (("train", ()), ("tune", ("tune",))):
        for row in read(*parts, "images.parquet")[::37]:
            metadata = json.loads(row["metadata"])
            assert metadata["prompt"] == row["prompt"]
            if metadata["tag"] == "color_attr":
                first, second = (f"{item['color']} {item['class']}" for item in metadata["include"])
                assert split_of(" & ".join(sorted((first, second)))) == split


def test_stored_verdicts_are_those_of_the_verifier():
    for row in read("images.parquet")[::97]:
        picture = np.asarray(Image.open(BytesIO(row["image"])))
        verdict = verify(picture, json.loads(row["metadata"]))
        assert (verdict.correct, verdict.graded) == (row["verifier"], pytest.approx(row["graded"]))


def test_stored_proxy_scores_are_those_of_the_proxy():
    from diffalign.rewards.pickscore import PickScore

    rows = read("images.parquet")[::211]
    pixels = np.stack([np.asarray(Image.open(BytesIO(row["image"]))) for row in rows])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    scores = PickScore.load("tiny-pickscore").score(images, [row["prompt"] for row in rows])
    assert scores.tolist() == pytest.approx([row["proxy"] for row in rows], abs=1e-3)
