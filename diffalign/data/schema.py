"""What data are: records as files hold them, examples as methods eat them, and the kinds of examples.

A *record* is one row of a data set in the canonical layout, ``{"prompt", "images": [...], one of "winner" | "ranking" |
"scores"}``; ties are kept in it. An *example* is what one method sees of it: the images it trains on in their order,
each with its caption, and numbers. ``diffalign.data.pairing`` turns records into examples of a kind.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, Generic, Self, TypeVar

from diffalign.data.image_source import ImageSource
from diffalign.errors import UserError, unknown
from diffalign.strategies.base import DataKind

E = TypeVar("E")
Numbers = float | tuple[float, ...] | tuple[tuple[float, ...], ...]
"""A number of an example, one for each of its images, or R for each of its images."""
_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a data set in the canonical layout.

    Args:
        id: stable and unique in the data set.
        prompt: the caption.
        images: any number of images of that caption.
        winner: index of the preferred image; None where not given or tied.
        tie: the judge saw no difference.
        ranking: indices of the images, best first.
        scores: one number an image (higher is better), or one number for each of R rewards.
        label: for a single image: 1 liked or matching, 0 not.
        captions: one caption for each image, where they differ (DCPO).
        mismatched: captions that do not fit the image, where the data bring some (TDPO, TKTO).
        fields: further numeric columns by name; a tuple as long as ``images`` belongs to the images.
        metadata: structured description of the caption, for rewards that need it.
    """

    id: str
    prompt: str
    images: tuple[ImageSource, ...] = ()
    winner: int | None = None
    tie: bool = False
    ranking: tuple[int, ...] | None = None
    scores: tuple[float, ...] | tuple[tuple[float, ...], ...] | None = None
    label: float | None = None
    captions: tuple[str, ...] | None = None
    mismatched: tuple[str, ...] = ()
    fields: Mapping[str, Numbers] = field(default_factory=lambda: _NOTHING)
    metadata: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)


@dataclass(frozen=True, slots=True)
class Example:
    """What a method sees of a record.

    Args:
        id: stable and unique in the data set; seeds and caches derive from it.
        prompts: one caption for each image, in the order of ``images``; a single one where there is no image.
        images: the images in block order: chosen before rejected, lists best first.
        fields: numbers that reach the strategy as ``Batch.fields``.
        metadata: structured description of the caption, for rewards that need it.
        size: (height, width) of the aspect bucket all images of the example are brought to; None for the run's own.
        alternatives: captions that take turns in place of the last one; none where it stays.
    """

    id: str
    prompts: tuple[str, ...]
    images: tuple[ImageSource, ...] = ()
    fields: Mapping[str, Numbers] = field(default_factory=lambda: _NOTHING)
    metadata: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    size: tuple[int, int] | None = None
    alternatives: tuple[str, ...] = ()

    def captions(self, draw: float) -> tuple[str, ...]:
        """Return the captions of a visit, one for each image.

        Args:
            draw: in [0, 1), says which of the alternatives has its turn.
        """
        if not self.alternatives:
            return self.prompts
        return *self.prompts[:-1], self.alternatives[int(draw * len(self.alternatives))]

    @property
    def group(self) -> Hashable:
        """Examples of one group fit into one batch: same number of images, same size."""
        return len(self.images), self.size


@dataclass(frozen=True)
class KindInfo:
    """What a kind of examples holds.

    Args:
        blocks: images of an example; 0 for none, -1 for any number of two or more.
        layout: what the blocks are, in order.
        columns: what a row of a data set must offer, in the canonical names.
        ties: what happens to rows whose judge saw no difference.
        caption_dropout: whether captions may be replaced by the empty one.
    """

    blocks: int
    layout: str
    columns: str
    ties: str
    caption_dropout: bool = True


DROPPED = "dropped and counted: neither image is preferred"
KINDS: Mapping[DataKind, KindInfo] = MappingProxyType(
    {
        "pairs": KindInfo(2, "chosen, rejected; one caption", "prompt, images, winner | ranking | scores", DROPPED),
        "caption_pairs": KindInfo(
            2, "chosen, rejected; a caption each", "prompt, images, winner | ranking | scores, captions", DROPPED
        ),
        "mismatched_captions": KindInfo(
            2, "one image twice; the matching caption, then the mismatched one", "prompt, images, mismatched",
            "dropped and counted: no image is preferred", caption_dropout=False,
        ),
        "ranked_lists": KindInfo(
            -1, "images best first; field scores", "prompt, images, scores | ranking",
            "kept: equal scores weigh nothing against each other; lists tied throughout are dropped and counted",
        ),
        "unpaired": KindInfo(
            1, "one image; field label, 1 liked, 0 disliked", "prompt, images, label | winner | ranking | scores",
            DROPPED,
        ),
        "winners": KindInfo(1, "one good image", "prompt, images", "dropped and counted: no image is preferred"),
        "prompts": KindInfo(0, "no image", "prompt", "kept: no image is used"),
    }
)  # fmt: skip
"""Every kind of examples; ``docs/data.md`` shows this table."""


def kind_info(kind: str) -> KindInfo:
    """Return what a kind holds.

    Raises:
        UserError: for an unknown kind, with the nearest known one.
    """
    if kind not in KINDS:
        raise unknown("data kind", kind, KINDS)
    return KINDS[kind]  # type: ignore[index]


@dataclass(frozen=True)
class HeldOut:
    """Held-out captions and the names of the rewards that judge images of them.

    Args:
        prompts: captions that never occur in the training data.
        metadata: one structured description a caption, for rewards that need it; the key "tag" names its category.
        rewards: names of rewards (``diffalign.rewards``), the main one first.
    """

    prompts: tuple[str, ...]
    metadata: tuple[Mapping[str, Any], ...]
    rewards: tuple[str, ...]


@dataclass(frozen=True)
class ExampleSet(Generic[E]):
    """All examples of a data set, in memory; of images as light handles that are read when they are used.

    Args:
        kind: what the examples are.
        examples: the examples.
        name: of the data set, for messages.
        notes: reason -> number of rows or images left out or treated specially; a run prints them.
        held_out: returns held-out captions and their judges for (split "tune" or "test", number of captions, seed),
            where the data set has them.
    """

    kind: DataKind
    examples: Sequence[E]
    name: str = "data"
    notes: Mapping[str, int] = field(default_factory=dict)
    held_out: Callable[[str, int, int], HeldOut] | None = None

    def __len__(self) -> int:
        return len(self.examples)

    def __iter__(self) -> Iterator[E]:
        return iter(self.examples)

    def with_examples(self, examples: Sequence[E], notes: Mapping[str, int] | None = None) -> Self:
        """Return the set with other examples and further notes; counts of zero are left out.

        Raises:
            UserError: if nothing is left.
        """
        merged = {**self.notes, **{reason: count for reason, count in (notes or {}).items() if count}}
        if not examples:
            raise UserError(f"{self.name}: nothing to train on is left ({describe_notes(merged)})")
        return replace(self, examples=examples, notes=merged)


@dataclass(frozen=True)
class StreamSet:
    """Examples that come one after the other and are never all in memory.

    Args:
        kind: what the examples are.
        open: starts a pass over the stream; called once an epoch (and again to resume), with the same order each time.
        name: of the data set, for messages.
        notes: reason -> number of rows left out so far, each counted once however many passes there are.
    """

    kind: DataKind
    open: Callable[[], Iterator[Example]]
    name: str = "stream"
    notes: Mapping[str, int] = field(default_factory=dict)


SKIPPED = "examples with unreadable images skipped"
"""A reason among notes."""


def describe_notes(notes: Mapping[str, int]) -> str:
    """Return counts as words, for example ``12 rows: ties dropped``."""
    return "; ".join(f"{count} {reason}" for reason, count in notes.items()) or "nothing left out"
