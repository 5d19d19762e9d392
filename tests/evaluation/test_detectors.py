"""Detectors of transformers: three kinds of tiny width and random weights, saved and loaded as published ones are."""

from __future__ import annotations

import json
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
from diffalign.evaluation.geneval.onnx_detector import OnnxDetector
from diffalign.evaluation.geneval.transformers_detector import TransformersDetector
from diffalign.evaluation.geneval.verdict import Detection
from diffalign.evaluation.geneval.vocabulary import CLASSES, COLORS
from diffalign.rewards.pickscore import PickScore
from diffalign.rewards.weights import PARCELS
from tests.rewards.photographs import photograph

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


class OneBox:
    """Sees a cat in the right half of the network's input, twice, and a doubtful dog."""

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        _, _, height, width = pixels.shape
        output = np.zeros((1, 84, 3), dtype=np.float32)
        output[0, :4] = np.array([[0.75 * width, 0.5 * height, 0.5 * width, height]] * 3).T
        for index, (name, score) in enumerate((("cat", 0.8), ("cat", 0.9), ("dog", 0.01))):
            output[0, 4 + CLASSES.index(name), index] = score
        return output


def test_boxes_of_a_padded_picture_come_back_in_its_own_pixels() -> None:
    (found,) = OnnxDetector(OneBox()).detect(Image.new("RGB", (300, 200)), "x.png")
    assert (found.name, found.score) == ("cat", pytest.approx(0.9))
    # 300 x 200 becomes 640 x 427 in the middle of 640 x 448: the padding lies outside the picture
    assert found.box == pytest.approx((150, 0, 300, 200), abs=0.1)


@pytest.mark.weights
@pytest.mark.parametrize(
    ("name", "expected"),
    [("chelsea", {"cat": 0.744}), ("coffee", {"dining table": 0.755, "cup": 0.633}), ("astronaut", {"person": 0.899})],
)
def test_real_weights_give_the_recorded_scores(name: str, expected: dict[str, float]) -> None:
    """Recorded with the picture stretched to a square, which leaves nothing to pad."""
    found = load_detector("yolo11n").detect(photograph(name).resize((640, 640)), "x.png")
    for label, score in expected.items():
        assert max(d.score for d in found if d.name == label) == pytest.approx(score, abs=0.01)


@pytest.mark.weights
def test_real_weights_on_real_photographs(script, tmp_path: Path) -> None:
    asked = [
        ("chelsea", ["cat"]),
        ("coffee", ["cup", "dining table"]),
        ("astronaut", ["person"]),
        ("astronaut", ["dog"]),
    ]
    for index, (name, classes) in enumerate(asked):
        include = [{"class": name, "count": 1} for name in classes]
        tag = "single_object" if len(classes) == 1 else "two_object"
        row = {"tag": tag, "include": include, "prompt": f"a photo of {classes}"}
        samples = tmp_path / f"{index:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(row) + "\n")
        photograph(name).save(samples / "00000.png")
    answer = script("geneval", "--images", tmp_path, "--detector", "yolo11n")
    assert answer.status == 0, answer.err
    verdicts = [json.loads(line) for line in (tmp_path / "geneval" / "results.jsonl").read_text().splitlines()]
    assert [row["correct"] for row in verdicts] == [True, True, True, False]
    manifest = json.loads((tmp_path / "geneval" / "manifest.json").read_text())
    assert manifest["detector"]["weights_hash"] == PARCELS["yolo11n"].sha256


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
