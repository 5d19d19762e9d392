"""Object detectors of transformers as GenEval's eyes.

Three kinds: instance segmentation (Mask2Former, as the official benchmark uses in mmdet), boxes (DETR, YOLOS, RT-DETR,
...), and open vocabularies (OWL-ViT, OWLv2), which are asked for GenEval's 80 classes. Absolute figures depend on the
detector: the official thresholds belong to Mask2Former with a Swin-S backbone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.evaluation.geneval.detectors import Detector
from diffalign.evaluation.geneval.verdict import Detection
from diffalign.evaluation.geneval.vocabulary import CLASSES, canonical
from diffalign.policies.fingerprint import fingerprint

SEGMENTERS = ("mask2former", "maskformer")
OPEN_VOCABULARY = ("owlvit", "owlv2")
_LEAST_SCORE = 0.05
"""Boxes below it are never looked at: every threshold of the benchmark lies higher."""


class TransformersDetector(Detector):
    """Build it with :meth:`load`.

    Args:
        name: what reports call it.
        model: the network.
        processor: its image processor; for open vocabularies the one that also takes texts.
    """

    def __init__(self, name: str, model: Any, processor: Any) -> None:
        self.name, self.model, self.processor = name, model.requires_grad_(False).eval(), processor
        self.weights_hash = fingerprint(model.named_parameters())
        labels: dict[int, str] = model.config.id2label
        self._names = {int(index): canonical(label) for index, label in labels.items()}

    @classmethod
    def load(cls, source: str, device: str = "cpu") -> TransformersDetector:
        """Load a detector by hub name or local folder.

        Raises:
            UserError: if it cannot be loaded, is no detector, or knows none of GenEval's classes.
        """
        import transformers

        try:
            kind = transformers.AutoConfig.from_pretrained(source).model_type
            if kind in SEGMENTERS:
                factory: Any = transformers.AutoModelForUniversalSegmentation
            elif kind in OPEN_VOCABULARY:
                factory = transformers.AutoModelForZeroShotObjectDetection
            else:
                factory = transformers.AutoModelForObjectDetection
            model = factory.from_pretrained(source).to(device)
            open_words = kind in OPEN_VOCABULARY
            reader: Any = transformers.AutoProcessor if open_words else transformers.AutoImageProcessor
            detector = cls(source, model, reader.from_pretrained(source))
        except (OSError, ValueError, ImportError) as problem:
            reason = str(problem).strip().splitlines()[0]
            raise UserError(f"cannot load the detector {source}: {reason}") from problem
        if not open_words and not any(detector._names.values()):
            raise UserError(f"the detector {source} knows none of GenEval's 80 classes (those of COCO)")
        return detector

    @torch.no_grad()
    def detect(self, picture: Image.Image, place: str) -> list[Detection]:
        """Return everything of one of the 80 classes."""
        kind = self.model.config.model_type
        words = {"text": [list(CLASSES)]} if kind in OPEN_VOCABULARY else {}
        inputs = self.processor(images=picture, return_tensors="pt", **words).to(self.model.device)
        outputs = self.model(**inputs)
        size = [(picture.height, picture.width)]
        if kind in SEGMENTERS:
            found = self.processor.post_process_instance_segmentation(
                outputs, threshold=_LEAST_SCORE, target_sizes=size, return_binary_maps=True
            )[0]
            return self._from_masks(found["segmentation"], found["segments_info"])
        if kind in OPEN_VOCABULARY:
            found = self.processor.post_process_grounded_object_detection(
                outputs, threshold=_LEAST_SCORE, target_sizes=size
            )[0]
            names: Sequence[str | None] = [CLASSES[index] for index in found["labels"].tolist()]
        else:
            found = self.processor.post_process_object_detection(outputs, threshold=_LEAST_SCORE, target_sizes=size)[0]
            names = [self._names.get(index) for index in found["labels"].tolist()]
        rows = zip(names, found["boxes"].tolist(), found["scores"].tolist(), strict=True)
        return [Detection(name, (b[0], b[1], b[2], b[3]), score) for name, b, score in rows if name is not None]

    def _from_masks(self, masks: Tensor | None, segments: Sequence[dict[str, Any]]) -> list[Detection]:
        """Turn masks (objects, height, width) into detections; a box is what its mask spans."""
        detections = []
        for segment in segments:
            name = self._names.get(segment["label_id"])
            assert masks is not None
            mask = masks[segment["id"]].cpu().numpy() > 0
            if name is None or not mask.any():
                continue
            rows, columns = np.nonzero(mask.any(1))[0], np.nonzero(mask.any(0))[0]
            box = (float(columns[0]), float(rows[0]), float(columns[-1] + 1), float(rows[-1] + 1))
            detections.append(Detection(name, box, float(segment["score"]), mask=mask))
        return detections
