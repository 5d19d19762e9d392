"""What finds the objects: one small interface, boxes computed elsewhere, and the bundled world's exact verifier."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffalign.errors import UserError, unknown
from diffalign.evaluation.geneval.verdict import Detection
from diffalign.records import read_jsonl, sha256_of
from diffalign.rewards.scoring import open_picture


class Detector(ABC):
    """Finds objects in pictures.

    Attributes:
        name: what reports call it.
        weights_hash: of its weights or its file; None where it has none.
    """

    name: str
    weights_hash: str | None = None

    @abstractmethod
    def detect(self, picture: Image.Image, place: str) -> list[Detection]:
        """Find everything in an RGB picture, however doubtful.

        Args:
            picture: the picture.
            place: its path relative to the folder under evaluation, with slashes.
        """


class WorldDetector(Detector):
    """The bundled world's exact verifier; what is of two colours, or of no clear shape, is not an object."""

    name = "world"

    def detect(self, picture: Image.Image, place: str) -> list[Detection]:
        """Return shapes with their colours, all of confidence 1."""
        from diffalign.world.verifier import detect

        found = detect(np.asarray(picture))
        return [Detection(d.shape, d.box, 1.0, d.color) for d in found if d.clean]


class BoxesFile(Detector):
    """Boxes that some other program has computed.

    Args:
        path: JSONL, one row a picture: ``filename`` (relative to the folder under evaluation) and ``detections``, a
            list of ``class``, ``box`` [left, top, right, bottom] in pixels, ``score``, and where they are known
            ``color`` and ``mask`` (a black-and-white picture beside the file, white on the object).

    Raises:
        UserError: if there is no such file, a row has another form, or a picture has two rows.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"there is no file of boxes at {path}")
        self.name, self.weights_hash, self.path = f"boxes@{path.name}", sha256_of(path), path
        self._rows: dict[str, list[Detection]] = {}
        for number, row in enumerate(read_jsonl(path, ("filename", "detections")), 1):
            place = str(row["filename"])
            if place in self._rows:
                raise UserError(f"{path} has two rows for {place}")
            try:
                self._rows[place] = [self._detection(found) for found in row["detections"]]
            except (KeyError, TypeError, ValueError) as problem:
                raise UserError(
                    f"{path}, row {number}: a detection needs class, box of four numbers and score ({problem!r})"
                ) from problem

    def _detection(self, row: Mapping[str, Any]) -> Detection:
        left, top, right, bottom = (float(value) for value in row["box"])
        mask = None
        if row.get("mask"):
            mask = np.asarray(open_picture(self.path.parent / row["mask"]).convert("L")) > 127
        return Detection(str(row["class"]), (left, top, right, bottom), float(row["score"]), row.get("color"), mask)

    def detect(self, picture: Image.Image, place: str) -> list[Detection]:
        """Return the row of a picture.

        Raises:
            UserError: if there is none.
        """
        if place not in self._rows:
            raise UserError(f"{self.path} has no row for {place}; a picture without objects has an empty list")
        return self._rows[place]


KINDS: Sequence[str] = ("world", "yolo11n", "boxes@FILE", "transformers@NAME")


def load_detector(spec: str, device: str = "cpu") -> Detector:
    """Load a detector.

    Args:
        spec: "world"; "yolo11n"; "boxes@FILE"; "transformers@NAME" (or just a name with a slash) for an object
            detector of transformers by hub name or local folder.
        device: where a network runs.

    Raises:
        UserError: for anything else, or what cannot be loaded.
    """
    kind, _, source = spec.partition("@")
    if spec == "world":
        return WorldDetector()
    if spec == "yolo11n":
        from diffalign.evaluation.geneval.onnx_detector import OnnxDetector

        return OnnxDetector.load()
    if kind == "boxes" and source:
        return BoxesFile(Path(source).expanduser())
    if kind == "transformers" and source:
        name = source
    elif "/" in spec or Path(spec).is_dir():
        name = spec
    else:
        raise unknown("detector", spec, KINDS)
    from diffalign.evaluation.geneval.transformers_detector import TransformersDetector

    return TransformersDetector.load(name, device)
