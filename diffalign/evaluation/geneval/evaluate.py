"""GenEval of a folder: pictures through the detector, verdicts in the official file format, summary, manifest."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.geneval.colors import OFFICIAL, ClipColors
from diffalign.evaluation.geneval.detectors import Detector, load_detector
from diffalign.evaluation.geneval.folder import Sample
from diffalign.evaluation.geneval.summary import Summary, summarise
from diffalign.evaluation.geneval.verdict import Detection, Rules, judge, known_colors
from diffalign.evaluation.manifest import generation_of
from diffalign.records import write_json, write_jsonl
from diffalign.rewards.scoring import open_picture

RESULTS, SUMMARY, MANIFEST = "results.jsonl", "summary.json", "manifest.json"
RESULTS_FOLDER = "geneval"
"""Beside the images, unless another is asked for."""
RULES_PRESET = "geneval-v1"
"""Name of the official constants; others are reported with what was changed."""


@dataclass(frozen=True)
class Eyes:
    """What looks at the pictures.

    Args:
        detector: finds the objects.
        colors: names their colours where the detector does not.
    """

    detector: Detector
    colors: ClipColors | None = None

    @classmethod
    def load(cls, detector: str, colors: str | None = None, device: str = "cpu") -> Eyes:
        """Load both by name.

        Args:
            detector: see ``load_detector``.
            colors: a CLIP model; "official" for OpenAI's ViT-L/14.
            device: where networks run.
        """
        namer = None if colors is None else ClipColors.load(OFFICIAL if colors == "official" else colors, device)
        return cls(load_detector(detector, device), namer)

    @property
    def label(self) -> str:
        """What results are called: figures of different detectors are not comparable."""
        return f"geneval-like (detector {self.detector.name})"


def evaluate(folder: Path, samples: Sequence[Sample], eyes: Eyes, rules: Rules) -> Iterator[dict[str, Any]]:
    """Judge pictures one by one.

    Args:
        folder: that the samples' paths are relative to.
        samples: the pictures.
        eyes: what looks at them.
        rules: constants of the verdict.

    Yields:
        rows of the official ``results.jsonl``: filename, tag, prompt, correct, reason, metadata, details.

    Raises:
        UserError: for a picture that cannot be read, or a caption with a colour where nothing names colours.
    """
    for sample in samples:
        picture = open_picture(folder / sample.place)
        metadata = sample.metadata
        verdict = judge(eyes.detector.detect(picture, sample.place), metadata, rules, _Namer(picture, eyes))
        details = {name: [[*d.box, d.score] for d in kept] for name, kept in verdict.kept.items()}
        yield {
            "filename": sample.place,
            "tag": metadata["tag"],
            "prompt": metadata["prompt"],
            "correct": verdict.correct,
            "reason": verdict.reason,
            "metadata": json.dumps(metadata),
            "details": json.dumps(details),
        }


class _Namer:
    """Names colours: the detector's own where it gave them, else the classifier's."""

    def __init__(self, picture: Image.Image, eyes: Eyes) -> None:
        self.picture, self.eyes = picture, eyes

    def __call__(self, objects: Sequence[Detection], name: str) -> Sequence[str]:
        if all(found.color is not None for found in objects):
            return known_colors(objects, name)
        if self.eyes.colors is None:
            raise UserError(
                f"the detector {self.eyes.detector.name} names no colours; choose a CLIP model that does (--colors)"
            )
        return self.eyes.colors.name_colors(self.picture, objects, name)


def rules_name(rules: Rules) -> str:
    """Name a set of constants: the preset, and what differs from it."""
    official = asdict(Rules())
    changed = [f"{name}={value}" for name, value in asdict(rules).items() if value != official[name]]
    return RULES_PRESET + (f" ({', '.join(changed)})" if changed else "")


def write_results(output: Path, folder: Path, rows: Sequence[Mapping[str, Any]], eyes: Eyes, rules: Rules) -> Summary:
    """Write verdicts, summary and manifest into a folder.

    Args:
        output: where to.
        folder: the pictures.
        rows: their verdicts.
        eyes, rules: what they were reached with.
    """
    summary = summarise(rows)
    detector, colors, label = eyes.detector, eyes.colors, eyes.label
    write_jsonl(output / RESULTS, rows)
    write_json(
        output / MANIFEST,
        {
            "benchmark": label,
            "preset": rules_name(rules),
            "rules": asdict(rules),
            "detector": {"name": detector.name, "weights_hash": detector.weights_hash},
            "colors": None if colors is None else {"name": colors.name, "weights_hash": colors.weights_hash},
            "images": len(rows),
            "generation": generation_of(folder),
        },
    )
    write_json(output / SUMMARY, {"benchmark": label, "preset": rules_name(rules), **summary.as_dict()})
    return summary
