"""Captions of the bundled world, in GenEval's six kinds, wording and metadata format.

A caption's *composition* is what it asks to be combined ("red circle & blue star", "star left of circle"). Compositions
of the large kinds are divided by a stable hash: the base model is trained on captions of the "train" part only, so the
compositions of "tune" and "test" captions never occur in its training data. Kinds too small to divide (one shape, one
coloured shape, two shapes, a plain count) are shared by all splits and flagged ``shared``.
"""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any, Literal

SHAPES = ("circle", "square", "triangle", "star", "diamond", "cross")
COLORS = ("red", "orange", "yellow", "green", "cyan", "blue", "purple")
RELATIONS = ("left of", "right of", "above", "below")
COUNT_WORDS = {2: "two", 3: "three", 4: "four"}
KIND_WEIGHTS = {
    "single_object": 0.05,
    "two_object": 0.15,
    "counting": 0.20,
    "colors": 0.10,
    "position": 0.25,
    "color_attr": 0.25,
}
KINDS = tuple(KIND_WEIGHTS)
PLAIN_COUNT_SHARE = 0.3
PLAIN_POSITION_SHARE = 0.5
"""The rest of these kinds also names colours, which GenEval does not but its metadata can say."""

Split = Literal["train", "tune", "test"]


@dataclass(frozen=True)
class PromptRecord:
    """A caption with its meaning.

    Args:
        text: the caption.
        metadata: GenEval's row: ``tag``, ``include`` (class, count, color, position), ``exclude``, ``prompt``.
        composition: canonical name of the combination asked for.
        shared: the kind is too small to be divided among the splits.
    """

    text: str
    metadata: dict[str, Any]
    composition: str
    shared: bool

    @property
    def kind(self) -> str:
        """One of GenEval's six kinds."""
        return str(self.metadata["tag"])


def with_article(noun: str) -> str:
    """Put "a" or "an" before a noun phrase."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plural(noun: str) -> str:
    """Plural of a shape's name."""
    return noun + ("es" if noun.endswith("s") else "s")


def vocabulary() -> list[str]:
    """Return every word that captions use, in alphabetical order."""
    words = {"a", "an", "photo", "of", "and", *COUNT_WORDS.values(), *COLORS, *SHAPES, *map(plural, SHAPES)}
    return sorted(words | {word for relation in RELATIONS for word in relation.split()})


def split_of(composition: str) -> Split:
    """Assign a composition to a split: 70 % train, 10 % tune, 20 % test, by a stable hash."""
    bucket = int(hashlib.blake2b(composition.encode(), digest_size=4).hexdigest(), 16) % 20
    return "test" if bucket < 4 else "tune" if bucket < 6 else "train"


def draw_prompt(split: Split, rng: random.Random) -> PromptRecord:
    """Draw one caption of a split; the hard kinds are the most frequent."""
    kind = rng.choices(KINDS, list(KIND_WEIGHTS.values()))[0]
    while True:
        record = _MAKERS[kind](rng)
        if record.shared or split_of(record.composition) == split:
            return record


def prompts(split: Split, count: int, seed: int) -> list[PromptRecord]:
    """Draw captions of a split.

    Args:
        split: where their compositions belong.
        count: how many; distinct as long as there are that many (over 1,000 in "test").
        seed: other seeds give other captions.
    """
    rng = random.Random(f"{split}/{seed}")
    chosen: dict[str, PromptRecord] = {}
    repeats: list[PromptRecord] = []
    misses = 0
    while len(chosen) + len(repeats) < count:
        record = draw_prompt(split, rng)
        if record.text not in chosen:
            chosen[record.text], misses = record, 0
        elif misses < 500:
            misses += 1
        else:
            repeats.append(record)
    return [*chosen.values(), *repeats]


def _record(kind: str, text: str, include: list[dict[str, Any]], composition: str, shared: bool) -> PromptRecord:
    metadata: dict[str, Any] = {"tag": kind, "include": include, "prompt": text}
    return PromptRecord(text, metadata, composition, shared)


def _two_shapes(rng: random.Random) -> tuple[str, str]:
    first = rng.choice(SHAPES)
    return first, rng.choice([shape for shape in SHAPES if shape != first])


def _two_colored(rng: random.Random) -> tuple[str, str, str, str]:
    shape, color = rng.choice(SHAPES), rng.choice(COLORS)
    other = rng.choice([s for s in SHAPES if s != shape])
    return shape, color, other, rng.choice([c for c in COLORS if c != color])


def _single_object(rng: random.Random) -> PromptRecord:
    shape = rng.choice(SHAPES)
    include = [{"class": shape, "count": 1}]
    return _record("single_object", f"a photo of {with_article(shape)}", include, shape, True)


def _colors(rng: random.Random) -> PromptRecord:
    shape, color = rng.choice(SHAPES), rng.choice(COLORS)
    include = [{"class": shape, "count": 1, "color": color}]
    return _record("colors", f"a photo of {with_article(f'{color} {shape}')}", include, f"{color} {shape}", True)


def _counting(rng: random.Random) -> PromptRecord:
    shape, color, count = rng.choice(SHAPES), rng.choice(COLORS), rng.choice(list(COUNT_WORDS))
    include: dict[str, Any] = {"class": shape, "count": count}
    plain = rng.random() < PLAIN_COUNT_SHARE
    if not plain:
        include["color"] = color
    noun = shape if plain else f"{color} {shape}"
    record = _record("counting", f"a photo of {COUNT_WORDS[count]} {plural(noun)}", [include], f"{count} {noun}", plain)
    record.metadata["exclude"] = [{"class": shape, "count": count + 1}]
    return record


def _two_object(rng: random.Random) -> PromptRecord:
    first, second = _two_shapes(rng)
    text = f"a photo of {with_article(first)} and {with_article(second)}"
    include = [{"class": first, "count": 1}, {"class": second, "count": 1}]
    return _record("two_object", text, include, " & ".join(sorted((first, second))), True)


def _position(rng: random.Random) -> PromptRecord:
    anchor, anchor_color, placed, placed_color = _two_colored(rng)
    relation = rng.choice(RELATIONS)
    include: list[dict[str, Any]] = [{"class": anchor, "count": 1}, {"class": placed, "count": 1}]
    if rng.random() >= PLAIN_POSITION_SHARE:
        include[0]["color"], include[1]["color"] = anchor_color, placed_color
        anchor, placed = f"{anchor_color} {anchor}", f"{placed_color} {placed}"
    include[1]["position"] = [relation, 0]
    text = f"a photo of {with_article(placed)} {relation} {with_article(anchor)}"
    return _record("position", text, include, f"{placed} {relation} {anchor}", False)


def _color_attr(rng: random.Random) -> PromptRecord:
    shape, color, other, other_color = _two_colored(rng)
    first, second = f"{color} {shape}", f"{other_color} {other}"
    text = f"a photo of {with_article(first)} and {with_article(second)}"
    include = [
        {"class": shape, "count": 1, "color": color},
        {"class": other, "count": 1, "color": other_color},
    ]
    return _record("color_attr", text, include, " & ".join(sorted((first, second))), False)


_MAKERS = {
    "single_object": _single_object,
    "two_object": _two_object,
    "counting": _counting,
    "colors": _colors,
    "position": _position,
    "color_attr": _color_attr,
}
