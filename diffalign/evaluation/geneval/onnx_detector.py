"""YOLO11n over ONNX as GenEval's eyes: small real COCO weights that a package carries.

The weights are Ultralytics' under AGPL-3.0; nothing of them is part of diffalign, and whoever chooses this detector
fetches them (``diffalign.rewards.weights``).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.errors import MissingExtra
from diffalign.evaluation.geneval.detectors import Detector
from diffalign.evaluation.geneval.verdict import Detection
from diffalign.evaluation.geneval.vocabulary import CLASSES
from diffalign.records import sha256_of
from diffalign.rewards.weights import weights_file

NAME = "yolo11n"
SIDE = 640
"""Longest side of the network's input."""
_STRIDE = 32
_FILL = 114
"""Grey around pictures whose sides are no multiples of the stride, as in training."""
_LEAST_SCORE = 0.05
_MAX_OVERLAP = 0.7
"""Of two boxes of one class, as in the network's own tools."""

Floats = NDArray[np.float32]


class OnnxDetector(Detector):
    """A YOLO detector of COCO's classes.

    Args:
        predict: (1, 3, height, width) pixels in [0, 1] -> (1, 84, boxes): centre, width and height in pixels, then one
            score for each class.
        weights_hash: of its file.
    """

    name = NAME

    def __init__(self, predict: Callable[[Floats], Floats], weights_hash: str | None = None) -> None:
        self.predict, self.weights_hash = predict, weights_hash

    @classmethod
    def load(cls) -> OnnxDetector:
        """Load YOLO11n.

        Raises:
            MissingExtra: without onnxruntime.
            UserError: if the package with the weights is not there; says how to get it.
        """
        try:
            import onnxruntime
        except ImportError as problem:
            raise MissingExtra("onnxruntime", "scorers", f"the detector {NAME!r}") from problem
        path = weights_file(NAME)
        session = onnxruntime.InferenceSession(str(path))
        (inputs,) = session.get_inputs()
        return cls(lambda pixels: session.run(None, {inputs.name: pixels})[0], sha256_of(path))

    def detect(self, picture: Image.Image, place: str) -> list[Detection]:
        """Return everything of one of the 80 classes."""
        pixels, scale, offset = letterboxed(picture)
        output: Any = self.predict(pixels)[0].T  # (boxes, 84)
        classes, scores = output[:, 4:].argmax(1), output[:, 4:].max(1)
        likely = scores > _LEAST_SCORE
        centers, sizes = output[likely, :2], output[likely, 2:4]
        corners = np.concatenate([centers - sizes / 2, centers + sizes / 2], 1)
        corners = (corners - np.tile(offset, 2)) / scale
        corners = corners.clip(0, np.tile([picture.width, picture.height], 2))
        found = []
        for index in np.unique(classes[likely]):
            of_class = np.nonzero(classes[likely] == index)[0]
            for row in of_class[distinct(corners[of_class], scores[likely][of_class])]:
                left, top, right, bottom = (float(value) for value in corners[row])
                found.append(Detection(CLASSES[index], (left, top, right, bottom), float(scores[likely][row])))
        return found


def letterboxed(picture: Image.Image) -> tuple[Floats, float, NDArray[np.float64]]:
    """Resize a picture to the longest side and pad it to whole strides with grey.

    Returns:
        (1, 3, height, width) in [0, 1]; the scale; the offset (left, top) of the picture in it.
    """
    scale = SIDE / max(picture.size)
    width, height = (max(1, round(side * scale)) for side in picture.size)
    full = (-(-width // _STRIDE) * _STRIDE, -(-height // _STRIDE) * _STRIDE)
    offset = ((full[0] - width) // 2, (full[1] - height) // 2)
    canvas = Image.new("RGB", full, (_FILL,) * 3)
    canvas.paste(picture.resize((width, height), Image.Resampling.BILINEAR), offset)
    pixels = np.asarray(canvas, dtype=np.float32).transpose(2, 0, 1)[None] / 255
    return np.ascontiguousarray(pixels), scale, np.array(offset, dtype=np.float64)


def distinct(boxes: NDArray[Any], scores: NDArray[Any], max_overlap: float = _MAX_OVERLAP) -> NDArray[np.int64]:
    """Return the indices of the boxes that stay when of overlapping ones the best is kept, the best first.

    Args:
        boxes: (n, 4) left, top, right, bottom.
        scores: (n,).
        max_overlap: intersection over union above which the lesser goes.
    """
    rest = np.argsort(-scores, kind="stable")
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    kept = []
    while len(rest):
        best, rest = rest[0], rest[1:]
        kept.append(best)
        low = np.maximum(boxes[rest, :2], boxes[best, :2])
        high = np.minimum(boxes[rest, 2:], boxes[best, 2:])
        shared = (high - low).clip(0).prod(1)
        rest = rest[shared <= max_overlap * (areas[rest] + areas[best] - shared)]
    return np.array(kept, dtype=np.int64)
