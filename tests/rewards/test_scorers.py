"""Every scorer from its official checkpoint layout: arithmetic, gradients, wrong files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.aesthetic import load_aesthetic
from diffalign.rewards.clip_score import ClipScore
from diffalign.rewards.function import FunctionReward
from diffalign.rewards.heads import AffineHead
from diffalign.rewards.hpsv2 import HPSv2
from diffalign.rewards.image_reward import BlipRegressor, ImageReward
from diffalign.rewards.jpeg import JpegSize
from diffalign.rewards.loading import load_reward
from diffalign.rewards.ocr import OcrReward
from diffalign.rewards.open_clip_weights import architecture, clip_config, clip_tokenizer
from diffalign.rewards.pickscore import PickScore
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, ClipPreprocess
from tests.rewards import reference_towers
from tests.rewards.support import PROMPTS, check_gradient, waves

VISION = {
    "image_size": 32,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
TEXT = {"vocab_size": 12, "hidden_size": 12, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}


def pictures_of(images: Tensor) -> list[Image.Image]:
    return [Image.fromarray((x * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for x in images]


@pytest.fixture(scope="module")
def hps_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hps") / "HPS_v2_compressed.pt"
    torch.save({"state_dict": reference_towers.random_state()}, path)
    return path


def test_hpsv2_reads_the_official_layout(hps_file: Path) -> None:
    reward = HPSv2.load(str(hps_file), "hpsv2.1", config=reference_towers.CONFIG)
    images = waves(2, 16, 16)
    tokens = torch.tensor(clip_tokenizer()(PROMPTS, padding="max_length").input_ids)
    state = reference_towers.random_state()
    image = F.normalize(reference_towers.image_embedding(state, reward.preprocess(images)), dim=-1)
    text = F.normalize(reference_towers.text_embedding(state, tokens), dim=-1)
    torch.testing.assert_close(reward.score(images, PROMPTS), (image * text).sum(-1), atol=1e-5, rtol=1e-5)
    one_by_one = [reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(torch.cat(one_by_one), reward.score(images, PROMPTS), atol=1e-5, rtol=1e-5)
    assert reward.info.name == "hpsv2.1"
    check_gradient(reward, images)


def test_wrong_checkpoints_are_refused_with_words(hps_file: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a checkpoint of this scorer: .* missing .*expected \(49408, 1024\)"):
        HPSv2.load(str(hps_file))
    with pytest.raises(UserError, match="no checkpoint at nowhere"):
        load_reward("hpsv2@nowhere.pt")
    torch.save({"state_dict": 3}, tmp_path / "odd.pt")
    with pytest.raises(UserError, match="holds no state dict"):
        load_reward(f"hpsv2@{tmp_path / 'odd.pt'}")
    with pytest.raises(UserError, match="improved-aesthetic-predictor"):
        load_reward("aesthetic")
    with pytest.raises(UserError, match="unknown open_clip architecture 'ViT-H-41': did you mean"):
        architecture("ViT-H-41")


def test_official_architecture_and_vocabulary() -> None:
    config = clip_config(architecture("ViT-H-14"))
    assert (config.vision_config.num_attention_heads, config.text_config.num_hidden_layers) == (16, 24)
    # As open_clip's own tokenizer gives them.
    tokens = clip_tokenizer()(["a photo of a cat", "don't stop!", "wow!!! ok ..."]).input_ids
    assert tokens == [
        [49406, 320, 1125, 539, 320, 2368, 49407],
        [49406, 847, 713, 1691, 256, 49407],
        [49406, 2781, 995, 2481, 678, 49407],
    ]


def bert_tokenizer(folder: Path) -> str:
    from transformers import BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "photo", "of", "red", "circle"]
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)


def official_blip_names(network: BlipRegressor) -> dict[str, Tensor]:
    """The network's tensors under the names of the official checkpoint."""
    table = {
        "vision.embeddings.class_embedding": "blip.visual_encoder.cls_token",
        "vision.embeddings.position_embedding": "blip.visual_encoder.pos_embed",
        "vision.embeddings.patch_embedding": "blip.visual_encoder.patch_embed.proj",
        "vision.post_layernorm": "blip.visual_encoder.norm",
        "vision.encoder.layers": "blip.visual_encoder.blocks",
        "self_attn.projection": "attn.proj",
        "self_attn.qkv": "attn.qkv",
        "layer_norm": "norm",
        "text.": "blip.text_encoder.",
        "head.": "mlp.",
    }
    result: dict[str, Tensor] = {}
    for name, value in network.state_dict().items():
        for ours, official in table.items():
            if not (name.startswith("text.") and ours != "text."):
                name = name.replace(ours, official) if not name.startswith("blip.text") else name
        result[name] = value
    return result


def test_image_reward_reads_the_official_layout(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = BlipRegressor(VISION, TEXT).eval()
    names = official_blip_names(network)
    assert "blip.visual_encoder.blocks.1.norm2.weight" in names
    assert "blip.text_encoder.encoder.layer.0.crossattention.self.query.weight" in names
    torch.save(names | {"blip.text_encoder.embeddings.position_ids": torch.arange(512)}, tmp_path / "ImageReward.pt")
    reward = ImageReward.load(
        str(tmp_path / "ImageReward.pt"), bert_tokenizer(tmp_path / "bert"), vision=VISION, text=TEXT
    )
    images = waves(2, 32, 40)
    tokens = reward.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=35, return_tensors="pt")
    assert tokens.input_ids.shape == (2, 35)
    with torch.no_grad():
        want = network(reward.preprocess(images), tokens.input_ids, tokens.attention_mask)
    torch.testing.assert_close(reward.score(images, PROMPTS), want)
    assert not torch.equal(reward.score(images, PROMPTS[::-1]), want)
    check_gradient(reward, images)


def test_tensor_preprocessing_agrees_with_the_exact_one() -> None:
    reward = PickScore.load("tiny-pickscore")
    images = waves(2, 96, 128)
    quantised = (images * 255).round() / 255
    by_tensors = reward.preprocess(quantised)
    exact = reward.preprocess.exact(pictures_of(images))
    assert by_tensors.shape == exact.shape
    # One grey level is 2 / 255 after this normalisation; PIL rounds after each of its two passes.
    assert (by_tensors - exact).abs().max() <= 1.25 * 2 / 255
    drift = reward.score(quantised, PROMPTS) - reward.score_pictures(pictures_of(images), PROMPTS)
    assert drift.abs().max() < 0.01


@pytest.mark.parametrize("levels", [2, 256])
def test_resizing_clamps_after_each_pass_as_pil_does(levels: int) -> None:
    generator, resize = torch.Generator().manual_seed(0), ClipPreprocess(24, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    for height, width in ((24, 24), (9, 12), (12, 9), (30, 24), (40, 32), (96, 128), (100, 30)):
        images = torch.randint(levels, (1, 3, height, width), generator=generator) / (levels - 1)
        assert (resize(images) - resize.exact(pictures_of(images))).abs().max() <= 1.25 / 255


@pytest.mark.parametrize("edge", [8, 11, 16, 24])
def test_crops_and_borders_are_those_of_transformers(edge: int) -> None:
    from transformers import CLIPImageProcessorPil

    official = CLIPImageProcessorPil(size={"shortest_edge": edge}, crop_size={"height": 16, "width": 16})
    preprocess = ClipPreprocess.from_config(official.to_dict())
    for height, width in ((20, 33), (33, 20), (edge, 13), (12, 12)):
        images = torch.randint(256, (1, 3, height, width), generator=torch.Generator().manual_seed(0)) / 255
        pictures = pictures_of(images)
        want = torch.tensor(np.stack(official(pictures)["pixel_values"]))
        torch.testing.assert_close(preprocess.exact(pictures), want, atol=1e-5, rtol=0)
        assert preprocess(images).shape == want.shape
        # 1.25 grey levels over the smallest deviation
        assert (preprocess(images) - want).abs().max() <= 1.25 / 255 / min(CLIP_STD)


def test_old_and_odd_settings_of_image_processors() -> None:
    statistics = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD}
    assert ClipPreprocess.from_config({"crop_size": 224, "size": 256, **statistics}).edge == 256
    assert ClipPreprocess.from_config({"crop_size": 224, **statistics}).edge == 224
    for odd in (
        {"crop_size": 224, "size": {"height": 224, "width": 224}},
        {"crop_size": {"height": 224, "width": 192}, "size": {"shortest_edge": 224}},
    ):
        with pytest.raises(UserError, match="expected a shortest_edge and a square"):
            ClipPreprocess.from_config({**odd, **statistics})


def test_pickscore_matrix_has_the_row_scores_on_its_diagonal() -> None:
    reward, images = PickScore.load("tiny-pickscore"), waves(2, 64, 64)
    matrix = reward.score_matrix(images, PROMPTS)
    torch.testing.assert_close(matrix.diagonal(), reward.score(images, PROMPTS))
    check_gradient(reward, images, step=1e-3)


def test_clip_score_conventions() -> None:
    clip = PickScore.load("tiny-pickscore")
    images = waves(2, 64, 64)
    cosine = ClipScore(clip.towers, clip.preprocess, "cosine").score(images, PROMPTS)
    percent = ClipScore(clip.towers, clip.preprocess, "percent").score(images, PROMPTS)
    torch.testing.assert_close(percent, 100 * cosine.clamp(min=0))
    paper = ClipScore(clip.towers, clip.preprocess, "paper").score(images, PROMPTS)
    prefixed = [f"A photo depicts {prompt}" for prompt in PROMPTS]
    bare = ClipScore(clip.towers, clip.preprocess, "cosine").score(images, prefixed)
    torch.testing.assert_close(paper, 2.5 * bare.clamp(min=0))
    with pytest.raises(UserError, match="convention"):
        ClipScore(clip.towers, clip.preprocess, "percents")  # type: ignore[arg-type]


def test_aesthetic_head_is_affine_and_ignores_the_caption(tmp_path: Path) -> None:
    torch.manual_seed(0)
    torch.save(AffineHead(64).state_dict(), tmp_path / "head.pth")
    reward = load_aesthetic(str(tmp_path / "head.pth"), backbone="tiny-pickscore")
    images = waves(2, 64, 64)
    scores = reward.score(images, PROMPTS)
    assert torch.equal(scores, reward.score(images, PROMPTS[::-1]))
    embeddings = reward.towers.image(reward.preprocess(images))
    middle = AffineHead.from_state(torch.load(tmp_path / "head.pth"), "head")(embeddings.mean(0, keepdim=True))
    torch.testing.assert_close(middle[0], scores.mean())
    torch.save(AffineHead(48).state_dict(), tmp_path / "narrow.pth")
    with pytest.raises(UserError, match="embeddings of 48 numbers, but those of tiny-pickscore have 64"):
        load_aesthetic(str(tmp_path / "narrow.pth"), backbone="tiny-pickscore")


def test_jpeg_size_tells_noise_from_a_plain_picture() -> None:
    noise = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    images = torch.cat([noise, torch.full((1, 3, 32, 32), 0.5)])
    large, small = JpegSize(compressible=False), JpegSize(compressible=True)
    scores = large.score(images, PROMPTS)
    assert scores[0] > 2 * scores[1] > 0
    assert torch.equal(small.score(images, PROMPTS), -scores)


def test_ocr_reads_the_quoted_text_and_survives_its_recogniser() -> None:
    def recogniser(picture: Any) -> list[tuple[str, float]]:
        if picture.max() == 0:
            raise RuntimeError("nothing to see")
        return [("OPE", 0.9), ("N", 0.8), ("rubbish", 0.0)]

    reward = OcrReward(recogniser)
    images = torch.stack([torch.ones(3, 8, 8), torch.zeros(3, 8, 8), torch.ones(3, 8, 8)])
    scores = reward.score(images, ['a sign "Open"', 'a sign "Open"', 'a sign "Opal"'])
    torch.testing.assert_close(scores, torch.tensor([1.0, 0.0, 0.5]))
    assert reward.failures == 1
    with pytest.raises(UserError, match="in double quotes"):
        reward.score(images[:1], ["a sign"])


def test_functions_are_rewards_and_must_return_one_number_an_image() -> None:
    images = waves(2, 4, 4).requires_grad_()
    bright = FunctionReward(lambda x, prompts: x.mean(dim=(1, 2, 3)), "brightness", differentiable=True)
    assert torch.autograd.grad(bright.score(images, PROMPTS).sum(), images)[0].allclose(torch.tensor(1 / 48))
    lengths = FunctionReward(lambda x, prompts: [len(prompt) for prompt in prompts], "length")
    assert lengths.score(images, PROMPTS).tolist() == [23.0, 27.0]
    with pytest.raises(UserError, match=r"returned shape \(\) for 2 images"):
        FunctionReward(lambda x, prompts: x.mean(), "bad").score(images, PROMPTS)
