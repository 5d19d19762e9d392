"""True pictures of the bundled world: training captions, each with a picture that shows what it says.

The preference data hold samples of a model, with that model's own mistakes. Methods that imitate good images, or that
need a caption to be true of its image, can learn from these instead; nothing is stored, every picture is drawn when it
is read.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from PIL import Image

from diffalign.data.bundled import held_out
from diffalign.data.image_source import ImageSource, to_png
from diffalign.data.table import Table
from diffalign.diffusion.random import derive_seed

COUNT = 1536
"""How many pictures there are: as many as the samples that benchmarks/imitation.py compares them with."""


def read_rendered() -> Table:
    """Return captions of the training split, a true picture for each; the same at every call."""
    from diffalign.world.grammar import draw_prompt

    rng = random.Random("rendered")
    records = [draw_prompt("train", rng) for _ in range(COUNT)]

    def rows() -> Iterator[Mapping[str, Any]]:
        for index, record in enumerate(records):
            name = f"rendered-{index}"
            picture = ImageSource(name, partial(_png, record.metadata, index))
            yield {"id": name, "prompt": record.text, "image": picture, "metadata": record.metadata}

    return Table("rendered pictures", frozenset({"id", "prompt", "image", "metadata"}), rows, held_out=held_out)


def _png(metadata: Mapping[str, Any], index: int) -> bytes:
    from diffalign.world.render import render

    return to_png(Image.fromarray(render(metadata, random.Random(derive_seed("rendered", index)))))
