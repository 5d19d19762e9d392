"""The task of the bundled language model: to write the caption that a short request asks for.

A request names objects in few words, ``"red circle , blue star :"``, ``"three cross :"`` or
``"star left of red circle :"``; the caption must be one of the bundled world's, name exactly these objects, and end:
``"a photo of a red circle and a blue star"``. Both are read back into a :class:`Meaning`, so whether a caption is
right is a fact, not an opinion.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from diffalign.world.grammar import (
    COLORS,
    COUNT_WORDS,
    RELATIONS,
    SHAPES,
    PromptRecord,
    Split,
    plural,
    prompts,
    with_article,
)

END_OF_REQUEST = ":"
OPENING = ("a", "photo", "of")
PLURALS = {plural(shape): shape for shape in SHAPES}
COUNTS = {word: count for count, word in COUNT_WORDS.items()}
_MIRROR = {"right of": "left of", "below": "above"}
"""Relations that are read as their opposite with the two objects exchanged."""


@dataclass(frozen=True, order=True)
class Thing:
    """Some objects alike: ``count`` of them, of one shape, of one colour or of no colour that was named ("")."""

    shape: str
    color: str = ""
    count: int = 1

    @property
    def terse(self) -> str:
        """The words of a request: "three red circle"."""
        return " ".join(word for word in (COUNT_WORDS.get(self.count, ""), self.color, self.shape) if word)

    @property
    def phrase(self) -> str:
        """The words of a caption: "a red circle", "three red circles"."""
        if self.count > 1:
            return f"{COUNT_WORDS[self.count]} {f'{self.color} ' if self.color else ''}{plural(self.shape)}"
        return with_article(f"{self.color} {self.shape}" if self.color else self.shape)


ReadThing = Callable[[Sequence[str]], Thing | None]


@dataclass(frozen=True)
class Meaning:
    """What a request or a caption says.

    Args:
        things: the objects; in order of naming.
        relation: of the first thing to the second ("left of", ...), or "" where they merely stand together.
    """

    things: tuple[Thing, ...]
    relation: str = ""

    @property
    def canonical(self) -> tuple[tuple[Thing, ...], str]:
        """Equal for two meanings that say the same: "a star below a cross" and "a cross above a star"."""
        if not self.relation:
            return tuple(sorted(self.things)), ""
        things = self.things[::-1] if self.relation in _MIRROR else self.things
        return things, _MIRROR.get(self.relation, self.relation)

    def request(self) -> str:
        """Write the request."""
        joint = f" {self.relation} " if self.relation else " , "
        return f"{joint.join(thing.terse for thing in self.things)} {END_OF_REQUEST}"

    def caption(self) -> str:
        """Write the caption."""
        joint = f" {self.relation} " if self.relation else " and "
        return f"{' '.join(OPENING)} {joint.join(thing.phrase for thing in self.things)}"


def meaning_of(record: PromptRecord, rng: random.Random) -> Meaning:
    """Return the meaning of one of the world's captions; objects without relation come in random order."""
    include = record.metadata["include"]
    things = [Thing(row["class"], row.get("color", ""), row["count"]) for row in include]
    relation = str(include[-1].get("position", ("",))[0])
    if relation:  # GenEval's row says where the second object stands relative to the first
        return Meaning((things[1], things[0]), relation)
    rng.shuffle(things)
    return Meaning(tuple(things))


def draw_requests(split: Split, count: int, seed: int) -> dict[str, PromptRecord]:
    """Draw distinct requests of a split of the world's captions, each with the caption's record.

    Args:
        split: where their compositions belong; "tune" and "test" ask for what training never asked for, wherever the
            kind has room for that.
        count: how many; fewer where the split has fewer.
        seed: other seeds give other requests.
    """
    rng = random.Random(f"writer/{split}/{seed}")
    drawn: dict[str, PromptRecord] = {}
    for record in prompts(split, 2 * count, seed):  # captions that differ in order alone may make one request
        if len(drawn) < count:
            drawn.setdefault(meaning_of(record, rng).request(), record)
    return drawn


def read_request(text: str) -> Meaning | None:
    """Read a request; None if it is none."""
    words = text.split()
    if not words or words[-1] != END_OF_REQUEST:
        return None
    return _read(words[:-1], joint=",", read_thing=_read_terse)


def read_caption(text: str) -> Meaning | None:
    """Read a caption; None if it is not well-formed."""
    words = text.split()
    if tuple(words[:3]) != OPENING:
        return None
    return _read(words[3:], joint="and", read_thing=_read_phrase)


def _read(words: Sequence[str], joint: str, read_thing: ReadThing) -> Meaning | None:
    relation, parts = _divide(words, joint)
    things = [read_thing(part) for part in parts]
    whole = tuple(thing for thing in things if thing is not None)
    return Meaning(whole, relation) if len(whole) == len(things) else None


def _divide(words: Sequence[str], joint: str) -> tuple[str, list[Sequence[str]]]:
    for relation in RELATIONS:
        pattern = relation.split()
        for start in range(len(words)):
            if list(words[start : start + len(pattern)]) == pattern:
                return relation, [words[:start], words[start + len(pattern) :]]
    parts: list[Sequence[str]] = []
    start = 0
    for end in [*(i for i, word in enumerate(words) if word == joint), len(words)]:
        parts.append(words[start:end])
        start = end + 1
    return "", parts


def _read_terse(words: Sequence[str]) -> Thing | None:
    count = COUNTS.get(words[0], 1) if words else 1
    rest = words[1:] if count > 1 else words
    return _thing(rest, count, {shape: shape for shape in SHAPES})


def _read_phrase(words: Sequence[str]) -> Thing | None:
    if len(words) < 2:
        return None
    if words[0] in COUNTS:
        return _thing(words[1:], COUNTS[words[0]], PLURALS)
    article = "an" if words[1][0] in "aeiou" else "a"
    return _thing(words[1:], 1, {shape: shape for shape in SHAPES}) if words[0] == article else None


def _thing(words: Sequence[str], count: int, nouns: dict[str, str]) -> Thing | None:
    color = words[0] if len(words) == 2 else ""
    if len(words) not in (1, 2) or words[-1] not in nouns or (color and color not in COLORS):
        return None
    return Thing(nouns[words[-1]], color, count)
