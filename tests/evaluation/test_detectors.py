"""Detectors of transformers: three kinds of tiny width and random weights, saved and loaded as published ones are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.geneval.colors import GREY, ClipColors, crop
from diffalign.evaluation.geneval.detectors import load_detector
from diffalign.evaluation.geneval.transformers_detector import TransformersDetector
from diffalign.evaluation.geneval.verdict import Detection
from diffalign.evaluation.geneval.vocabulary import CLASSES, COLORS
from diffalign.rewards.pickscore import PickScore

LABELS = {0: "N/A", 1: "cat", 2: "remote", 3: "lamp"}
VISION = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


def boxes_detector() -> tuple[Any, Any]:
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(**VISION, image_size=(32, 32), patch_size=16, num_detection_tokens=6, id2label=LABELS)
    size = {"shortest_edge": 32, "longest_edge": 64}
    return YolosForObjectDetection(config), YolosImageProcessor(size=size)


def segmenter() -> tuple[Any, Any]:
    from transformers import (
        Mask2FormerConfig,
        Mask2FormerForUniversalSegmentation,
        Mask2FormerImageProcessor,
        SwinConfig,
    )

    backbone = SwinConfig(
        image_size=32, patch_size=4, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], window_size=2,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = Mask2FormerConfig(
        backbone_config=backbone, feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=32,
        encoder_layers=1, decoder_layers=1, num_attention_heads=2, dim_feedforward=32, num_queries=5, id2label=LABELS,
    )  # fmt: skip
    processor = Mask2FormerImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}, num_labels=len(LABELS))
    return Mask2FormerForUniversalSegmentation(config), processor


def open_vocabulary() -> tuple[Any, Any]:
    from transformers import OwlViTConfig, OwlViTForObjectDetection, OwlViTImageProcessor, OwlViTProcessor

    from diffalign.rewards.open_clip_weights import clip_tokenizer

    tokenizer = clip_tokenizer()
    tokenizer.model_max_length = 16
    config = OwlViTConfig(
        text_config={**VISION, "vocab_size": 49408, "max_position_embeddings": 16},
        vision_config={**VISION, "image_size": 32, "patch_size": 16},
        projection_dim=16,
    )
    images = OwlViTImageProcessor(size={"height": 32, "width": 32}, do_center_crop=False)
    return OwlViTForObjectDetection(config), OwlViTProcessor(images, tokenizer)


KINDS: dict[str, Callable[[], tuple[Any, Any]]] = {
    "boxes": boxes_detector,
    "masks": segmenter,
    "open vocabulary": open_vocabulary,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_detector_finds_known_classes_inside_the_picture(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, processor = KINDS[kind]()
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    detector = load_detector(f"transformers@{tmp_path}")
    assert isinstance(detector, TransformersDetector)
    assert detector.weights_hash == TransformersDetector("again", model, processor).weights_hash
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), dtype=np.uint8)
    found = detector.detect(Image.fromarray(noise), "x.png")
    assert found, "random weights see something everywhere"
    known = set(CLASSES) if kind == "open vocabulary" else {"cat", "tv remote"}
    for detection in found:
        assert detection.name in known
        assert 0 <= detection.score <= 1
        if kind == "masks":
            assert detection.mask is not None
            assert detection.mask.shape == (40, 60)
            left, top, right, bottom = (int(value) for value in detection.box)
            assert detection.mask[top:bottom, left:right].sum() == detection.mask.sum()


def test_what_is_no_detector_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load the detector"):
        load_detector(f"transformers@{tmp_path}")
    from transformers import YolosConfig, YolosForObjectDetection, YolosImageProcessor

    config = YolosConfig(**VISION, image_size=(32, 32), patch_size=16, num_detection_tokens=2, id2label={0: "lamp"})
    YolosForObjectDetection(config).save_pretrained(tmp_path)
    YolosImageProcessor().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="knows none of GenEval's 80 classes"):
        load_detector(str(tmp_path))


def test_colours_are_named_from_the_crop_on_grey() -> None:
    picture = Image.new("RGB", (20, 10), (255, 0, 0))
    mask = np.zeros((10, 20), dtype=bool)
    mask[2:8, 4:10] = True
    cut = np.asarray(crop(picture, Detection("car", (3.6, 2.0, 12.2, 8.0), 0.9, mask=mask)))
    assert cut.shape == (6, 8, 3)
    assert (cut[:, :6] == (255, 0, 0)).all()
    assert (cut[:, 6:] == GREY).all()

    clip = PickScore.load("tiny-pickscore")
    namer = ClipColors(clip.towers, clip.preprocess, "tiny")
    named = namer.name_colors(picture, [Detection("car", (0, 0, 20, 10), 0.9)] * 2, "car")
    assert len(named) == 2
    assert set(named) <= set(COLORS)
    assert namer._classifier("car").norm(dim=-1).allclose(torch.ones(10))
