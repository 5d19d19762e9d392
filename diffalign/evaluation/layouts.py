"""Where benchmarks' official scripts look for pictures: the path of each, relative to the folder."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.errors import UserError, unknown
from diffalign.evaluation.geneval.folder import METADATA, SAMPLES
from diffalign.evaluation.presets import SamplingPreset
from diffalign.evaluation.prompt_sets import EvalPrompt


@dataclass(frozen=True)
class Shot:
    """An image to draw.

    Args:
        index: place of its caption in the set.
        sample: which of the caption's images.
        seed: of its noise.
        prompt: the caption.
        metadata: the caption's description.
        place: path of the file, relative to the folder, with slashes.
    """

    index: int
    sample: int
    seed: int
    prompt: str
    metadata: Mapping[str, Any] | None
    place: str

    def row(self) -> dict[str, Any]:
        """Return the image's row in ``images.jsonl``."""
        values = {"image": self.place, "prompt": self.prompt, "index": self.index, "sample": self.sample}
        return {**values, "seed": self.seed, **({"metadata": dict(self.metadata)} if self.metadata else {})}


Place = Callable[[EvalPrompt, int, int, int], str]
"""(caption, its place in the set, which of its images, images of each caption) -> path."""


def _flat(prompt: EvalPrompt, index: int, sample: int, count: int) -> str:
    return f"images/{index:05d}_{sample}.png"


def _geneval(prompt: EvalPrompt, index: int, sample: int, count: int) -> str:
    _field(prompt, "include", "geneval", index)
    return f"{index:05d}/{SAMPLES}/{sample:05d}.png"


def _hps(prompt: EvalPrompt, index: int, sample: int, count: int) -> str:
    if count != 1:
        raise UserError(f"HPSv2's layout has one image a caption, not {count}")
    return f"{_field(prompt, 'style', 'hps', index)}/{_field(prompt, 'index', 'hps', index):05d}.jpg"


def _compbench(prompt: EvalPrompt, index: int, sample: int, count: int) -> str:
    return f"{SAMPLES}/{prompt.text.replace('/', ' ')}_{index * count + sample:06d}.png"


def _unigenbench(prompt: EvalPrompt, index: int, sample: int, count: int) -> str:
    return f"{_field(prompt, 'index', 'unigenbench', index)}_{sample}.png"


LAYOUTS: dict[str, Place] = {
    "flat": _flat,
    "geneval": _geneval,
    "hps": _hps,
    "compbench": _compbench,
    "unigenbench": _unigenbench,
}


def _field(prompt: EvalPrompt, name: str, layout: str, index: int) -> Any:
    if prompt.metadata is None or name not in prompt.metadata:
        raise UserError(f"the layout {layout!r} needs {name!r} of every caption, which caption {index} does not have")
    return prompt.metadata[name]


def plan(prompts: Sequence[EvalPrompt], preset: SamplingPreset, layout: str) -> list[Shot]:
    """List all images of an evaluation, caption by caption.

    Args:
        prompts: the captions.
        preset: images of each, and their seeds.
        layout: one of :data:`LAYOUTS`.

    Raises:
        UserError: for an unknown layout, or captions that do not say what it needs.
    """
    if layout not in LAYOUTS:
        raise unknown("layout", layout, LAYOUTS)
    place, count = LAYOUTS[layout], preset.images_per_prompt
    return [
        Shot(
            index,
            sample,
            preset.seed_of(index, sample),
            prompt.text,
            prompt.metadata,
            place(prompt, index, sample, count),
        )
        for index, prompt in enumerate(prompts)
        for sample in range(count)
    ]


def companions(shots: Sequence[Shot], layout: str) -> dict[str, str]:
    """Return path -> text of the files that belong to a layout besides the pictures."""
    if layout != "geneval":
        return {}
    return {f"{shot.index:05d}/{METADATA}": json.dumps(shot.metadata) + "\n" for shot in shots}
