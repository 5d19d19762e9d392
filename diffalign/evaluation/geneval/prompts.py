"""GenEval's captions, drawn as the official script draws them.

With :data:`OFFICIAL_SEED` and numpy's ``default_rng`` the official file comes out byte for byte
(``evaluation_metadata.jsonl``, :data:`OFFICIAL_SHA256`); other seeds give new captions of the same kind.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from diffalign.errors import UserError
from diffalign.evaluation.geneval.vocabulary import CLASSES, COLORS, NUMBER_WORDS, RELATIONS, plural, with_article

OFFICIAL_SEED = 43
OFFICIAL_COUNT = 100
OFFICIAL_SHA256 = "5c48e0813e812e3c373fa5c8ed07a8f0a483be30272b4427b0559c8048e67c13"
OFFICIAL_PROMPTS_SHA256 = "55b6e3650e980c13daf30569eb666e000faf19bfc2b7b4cbe999fcdb7aa9d680"
"""Of ``generation_prompts.txt``."""

_PERSON = CLASSES.index("person")
Row = dict[str, Any]


def generate_rows(seed: int = OFFICIAL_SEED, count: int = OFFICIAL_COUNT, max_count: int = 4) -> list[Row]:
    """Draw the six tasks.

    Args:
        seed: of numpy's ``default_rng``; 43 is the official one.
        count: captions of each task but ``single_object``, which has all classes once; repeats are dropped afterwards.
        max_count: largest number asked for by counting captions.

    Returns:
        rows of ``evaluation_metadata.jsonl``: tag, include, perhaps exclude, prompt.

    Raises:
        UserError: if ``max_count`` has no word or is below 2.
    """
    if not 2 <= max_count < len(NUMBER_WORDS):
        raise UserError(f"GenEval counts up to {max_count}, but captions can say two to {NUMBER_WORDS[-1]}")
    rng = np.random.default_rng(seed)
    rows = [_single_object(index) for index in rng.choice(len(CLASSES), size=len(CLASSES), replace=False)]
    draws: Sequence[Callable[[np.random.Generator], Row]] = (
        _two_object, partial(_counting, max_count=max_count), _colors, _position, _color_attr,
    )  # fmt: skip
    for draw in draws:
        rows += [draw(rng) for _ in range(count)]
    distinct: dict[str, Row] = {}
    for row in rows:
        distinct.setdefault(json.dumps(row, sort_keys=True), row)
    return list(distinct.values())


def as_jsonl(rows: Sequence[Row]) -> str:
    """Return the text of ``evaluation_metadata.jsonl``."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_prompts(rows: Sequence[Row]) -> str:
    """Return the text of ``generation_prompts.txt``."""
    return "".join(row["prompt"] + "\n" for row in rows)


def official_rows() -> list[Row]:
    """Return the 553 official rows.

    Raises:
        UserError: if this version of numpy draws other numbers than the official file was drawn with.
    """
    rows = generate_rows()
    digest = hashlib.sha256(as_jsonl(rows).encode()).hexdigest()
    if digest != OFFICIAL_SHA256:
        raise UserError(
            f"numpy {np.__version__} draws other numbers than GenEval's captions were drawn with (sha256 {digest}); "
            "give the official evaluation_metadata.jsonl as a file"
        )
    return rows


def _row(tag: str, include: list[Row], prompt: str, exclude: list[Row] | None = None) -> Row:
    return {"tag": tag, "include": include, **({"exclude": exclude} if exclude else {}), "prompt": prompt}


def _single_object(index: int) -> Row:
    name = CLASSES[index]
    return _row("single_object", [{"class": name, "count": 1}], f"a photo of {with_article(name)}")


def _two_object(rng: np.random.Generator) -> Row:
    first, second = (CLASSES[index] for index in rng.choice(len(CLASSES), size=2, replace=False))
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return _row("two_object", include, f"a photo of {with_article(first)} and {with_article(second)}")


def _counting(rng: np.random.Generator, max_count: int) -> Row:
    name = CLASSES[rng.choice(len(CLASSES))]
    number = int(rng.integers(2, max_count, endpoint=True))
    include, exclude = [{"class": name, "count": number}], [{"class": name, "count": number + 1}]
    return _row("counting", include, f"a photo of {NUMBER_WORDS[number]} {plural(name)}", exclude)


def _without_person(index: int) -> str:
    """Class of a draw from 79: person, whose colour nobody asks for, is stepped over."""
    return CLASSES[(index + 1 + _PERSON) % len(CLASSES)]


def _colors(rng: np.random.Generator) -> Row:
    name = _without_person(int(rng.choice(len(CLASSES) - 1)))
    color = COLORS[rng.choice(len(COLORS))]
    return _row("colors", [{"class": name, "count": 1, "color": color}], f"a photo of {with_article(color)} {name}")


def _position(rng: np.random.Generator) -> Row:
    placed, anchor = (CLASSES[index] for index in rng.choice(len(CLASSES), size=2, replace=False))
    relation = RELATIONS[rng.choice(len(RELATIONS))]
    include = [{"class": anchor, "count": 1}, {"class": placed, "count": 1, "position": [relation, 0]}]
    return _row("position", include, f"a photo of {with_article(placed)} {relation} {with_article(anchor)}")


def _color_attr(rng: np.random.Generator) -> Row:
    names = [_without_person(int(index)) for index in rng.choice(len(CLASSES) - 1, size=2, replace=False)]
    colors = [COLORS[index] for index in rng.choice(len(COLORS), size=2, replace=False)]
    include = [{"class": name, "count": 1, "color": color} for name, color in zip(names, colors, strict=True)]
    phrases = [f"{with_article(color)} {name}" for name, color in zip(names, colors, strict=True)]
    return _row("color_attr", include, f"a photo of {phrases[0]} and {phrases[1]}")
