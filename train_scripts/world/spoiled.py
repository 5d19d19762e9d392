"""Pictures and captions with something wrong: one fact changed, or shapes deformed as half-trained models do."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from diffalign.world.grammar import COLORS, COUNT_WORDS, RELATIONS, SHAPES, plural, with_article
from diffalign.world.render import SIDE, render

Picture = NDArray[np.uint8]


def spoil_meaning(metadata: Mapping[str, Any], rng: random.Random) -> dict[str, Any]:
    """Change one thing that a caption asks for: a shape, a colour, a count, a relation, or which object has which."""
    changed = copy.deepcopy(dict(metadata))
    rows = changed["include"]
    row = rng.choice(rows)
    options = ["shape"]
    options += ["color"] * 2 if "color" in row else []
    options += ["count"] * 2 if len(rows) == 1 else []
    options += ["relation"] * 3 if "position" in rows[-1] else []
    options += ["swap"] * 2 if len(rows) == 2 and "color" in rows[0] else []
    choice = rng.choice(options)
    if choice == "shape":
        row["class"] = rng.choice([shape for shape in SHAPES if shape not in {r["class"] for r in rows}])
    elif choice == "color":
        row["color"] = rng.choice([color for color in COLORS if color != row["color"]])
    elif choice == "count":
        row["count"] = rng.choice([count for count in (1, 2, 3, 4) if count != row["count"]])
    elif choice == "relation":
        relation, target = rows[-1]["position"]
        rows[-1]["position"] = [rng.choice([other for other in RELATIONS if other != relation]), target]
    else:
        rows[0]["color"], rows[1]["color"] = rows[1]["color"], rows[0]["color"]
    return changed


def spoil_caption(text: str, rng: random.Random) -> str:
    """Change one word of a caption (colour, shape, count or relation), or exchange its two colours."""
    words = _joined_relations(text).split()
    colors = [index for index, word in enumerate(words) if word in COLORS]
    if len(colors) == 2 and rng.random() < 0.3:
        first, second = colors
        words[first], words[second] = words[second], words[first]
    else:
        index, family = rng.choice([(i, f) for i, word in enumerate(words) for f in _FAMILIES if word in f])
        words[index] = rng.choice([other for other in family if other not in words])
    return _with_articles(words)


_PLURALS = tuple(map(plural, SHAPES))
_RELATION_WORDS = tuple(relation.replace(" ", "_") for relation in RELATIONS)
_FAMILIES = (COLORS, SHAPES, _PLURALS, tuple(COUNT_WORDS.values()), _RELATION_WORDS)
"""Words of which one may stand for another."""


def _joined_relations(text: str) -> str:
    for relation, word in zip(RELATIONS, _RELATION_WORDS, strict=True):
        text = text.replace(relation, word)
    return text


def _with_articles(words: list[str]) -> str:
    """Join words and choose "a" or "an" anew before each."""
    for index, word in enumerate(words[:-1]):
        if word in ("a", "an"):
            words[index] = with_article(words[index + 1]).split()[0]
    return " ".join(words).replace("_", " ")


def spoil_picture(picture: Picture, metadata: Mapping[str, Any], rng: random.Random) -> Picture:
    """Deform a true picture: bend it, blend it with another, or paste a piece of another into it."""
    other = render(metadata, rng)
    return rng.choice([bend(picture, rng), blend(picture, other), patch(picture, other, rng)])


def bend(picture: Picture, rng: random.Random) -> Picture:
    """Displace pixels by a smooth random field of a few pixels."""
    chance = np.random.default_rng(rng.getrandbits(32))
    strength = rng.uniform(4, 8)
    fields = [
        np.asarray(Image.fromarray(chance.normal(0, strength, (8, 8)).astype(np.float32)).resize((SIDE, SIDE)))
        for _ in range(2)
    ]
    rows, columns = np.mgrid[:SIDE, :SIDE]
    rows = (rows + fields[0]).round().astype(int).clip(0, SIDE - 1)
    columns = (columns + fields[1]).round().astype(int).clip(0, SIDE - 1)
    return picture[rows, columns]


def blend(picture: Picture, other: Picture) -> Picture:
    """Keep the darker of two pictures at every pixel: objects run into each other."""
    return np.minimum(picture, other)


def patch(picture: Picture, other: Picture, rng: random.Random) -> Picture:
    """Take one half of the picture from another: objects are cut, missing or too many."""
    result = picture.copy()
    middle = rng.randint(SIDE // 3, 2 * SIDE // 3)
    if rng.random() < 0.5:
        result[middle:] = other[middle:]
    else:
        result[:, middle:] = other[:, middle:]
    return result
