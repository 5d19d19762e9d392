"""From records to the examples a method needs; pure functions of records, apart from any reading.

All that is known of a row's images is brought to one form, a *utility* for each image: 1 for a winner and 0 for the
others, the place from the bottom for a ranking, the score itself, or for several rewards the share of (reward, other
image) comparisons won (RankDPO, arXiv 2410.18013, which needs no common scale). Pairs, lists and labels follow from it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from diffalign.data.schema import Example, Numbers, Record
from diffalign.errors import UserError
from diffalign.strategies.base import DataKind

PairRule = Literal["best_worst", "all", "adjacent", "tournament"]
ROLLOUT = "rollout"
"""Key of the metadata under which images that were sampled for labelling say how (``rollouts.labelled``)."""


@dataclass(frozen=True)
class PairingOptions:
    """How several images of a caption become pairs.

    Args:
        rule: the best with the worst; all pairs; neighbours in the order; or the matches of a knockout tournament.
        margin: smallest score difference of a pair; applies where there are scores.
    """

    rule: PairRule = "best_worst"
    margin: float = 0.0


def utilities(record: Record) -> list[float] | None:
    """Return one number an image, higher is better; None where nothing is known of them."""
    count = len(record.images)
    if record.tie:
        return [0.0] * count
    if record.winner is not None:
        return [float(index == record.winner) for index in range(count)]
    if record.ranking is not None:
        return [float(count - 1 - record.ranking.index(index)) for index in range(count)]
    if record.scores is None:
        return None
    rows = [score if isinstance(score, tuple) else (score,) for score in record.scores]
    return votes(rows) if len(rows[0]) > 1 else [row[0] for row in rows]


def votes(scores: Sequence[Sequence[float]]) -> list[float]:
    """Return for each image the share of (reward, other image) comparisons it wins, in [0, 1]; ties win nothing.

    Args:
        scores: R rewards for each of N images.
    """
    rivals = max(1, (len(scores) - 1) * len(scores[0]))
    return [
        sum(mine > theirs for other in scores for mine, theirs in zip(row, other, strict=True)) / rivals
        for row in scores
    ]


def pair_indices(values: Sequence[float], rule: PairRule = "best_worst", margin: float = 0.0) -> list[tuple[int, int]]:
    """Return (better, worse) indices, best first; pairs of equal value and pairs within the margin are left out."""
    order = sorted(range(len(values)), key=lambda index: -values[index])
    if rule == "best_worst":
        candidates: Iterable[tuple[int, int]] = [(order[0], order[-1])] if len(order) > 1 else []
    elif rule == "all":
        candidates = itertools.combinations(order, 2)
    elif rule == "adjacent":
        candidates = itertools.pairwise(order)
    else:
        candidates = _matches(values)
    return [
        (better, worse)
        for better, worse in candidates
        if values[better] > values[worse] and values[better] - values[worse] >= margin
    ]


def _matches(values: Sequence[float]) -> list[tuple[int, int]]:
    """Return the (winner, loser) indices of a knockout among images in the order given, the final first.

    Neighbours meet, winners go on, an odd one out goes on without a match; of equals the earlier goes on.
    """
    players, rounds = list(range(len(values))), []
    while len(players) > 1:
        met = [(a, b) if values[a] >= values[b] else (b, a) for a, b in zip(players[::2], players[1::2], strict=False)]
        rounds.append(met)
        players = [winner for winner, _ in met] + players[2 * len(met) :]
    return [match for met in reversed(rounds) for match in met]


def winner_indices(record: Record) -> list[int]:
    """Return the good images: the best of several, a liked one, or all where nothing else is known; none of a tie."""
    if record.label is not None:
        return [0] if record.label == 1.0 else []
    values = utilities(record)
    if values is None or len(values) == 1:
        return list(range(len(record.images)))
    return [max(range(len(values)), key=values.__getitem__)] if len(set(values)) > 1 else []


def to_pairs(record: Record, options: PairingOptions, notes: Counter[str]) -> Iterator[Example]:
    """Yield (chosen, rejected) under the one caption; ties are counted."""
    for pair in _preferred(record, options, notes):
        yield _example(record, pair, (record.prompt, record.prompt), _pair_scores(record, pair))


def to_caption_pairs(record: Record, options: PairingOptions, notes: Counter[str]) -> Iterator[Example]:
    """Yield (chosen, rejected), each under its own caption; without captions the rejected one gets the mismatched."""
    for pair in _preferred(record, options, notes):
        if record.captions is not None:
            first, rejected = record.captions[pair[0]], record.captions[pair[1] : pair[1] + 1]
        else:
            first, rejected = record.prompt, _mismatches_of(record)
        notes["pairs whose two captions are equal"] += first in rejected
        yield _example(record, pair, (first, rejected[0]), _pair_scores(record, pair), rejected)


def to_ranked_lists(record: Record, options: PairingOptions, notes: Counter[str]) -> Iterator[Example]:
    """Yield all images best first with their scores; a ranking without scores counts places."""
    values = _known(record)
    if len(set(values)) < 2:
        notes["lists tied throughout dropped"] += 1
        return
    order = tuple(sorted(range(len(values)), key=lambda index: -values[index]))
    scores: Numbers = tuple((record.scores or values)[index] for index in order)  # type: ignore[assignment]
    yield _example(record, order, (record.prompt,) * len(order), {"scores": scores})


def to_unpaired(record: Record, options: PairingOptions, notes: Counter[str]) -> Iterator[Example]:
    """Yield single images with a label: liked if preferred at least once, disliked if only passed over."""
    if record.label is not None:
        if record.label == 0.5:
            notes["ties dropped"] += 1
        else:
            yield _example(record, (0,), (record.prompt,), {"label": record.label})
        return
    pairs = _preferred(record, options, notes)
    liked = {better for better, _ in pairs}
    for index in sorted({index for pair in pairs for index in pair}):
        yield _example(record, (index,), (record.prompt,), {"label": float(index in liked)})


def to_winners(record: Record, options: PairingOptions, notes: Counter[str]) -> Iterator[Example]:
    """Yield good images: the best of several, the liked, or all where nothing else is known."""
    for index in _winners(record, notes):
        yield _example(record, (index,), (record.prompt,))


def to_mismatched_captions(record: Record, options: PairingOptions, notes: Counter[str]) -> Iterator[Example]:
    """Yield a good image twice: under its caption, and under a mismatched one."""
    for index in _winners(record, notes):
        mismatched = _mismatches_of(record)
        yield _example(record, (index, index), (record.prompt, mismatched[0]), alternatives=mismatched)


def to_prompts(record: Record, options: PairingOptions, notes: Counter[str]) -> Iterator[Example]:
    """Yield the caption alone; of images that a rollout sampled, what is known joins its description as ``scores``."""
    example = _example(record, (), (record.prompt,))
    values = utilities(record) if ROLLOUT in record.metadata else None
    yield example if values is None else replace(example, metadata={**example.metadata, "scores": values})


Conversion = Callable[[Record, PairingOptions, "Counter[str]"], Iterator[Example]]
CONVERSIONS: Mapping[DataKind, Conversion] = {
    "pairs": to_pairs,
    "caption_pairs": to_caption_pairs,
    "mismatched_captions": to_mismatched_captions,
    "ranked_lists": to_ranked_lists,
    "unpaired": to_unpaired,
    "winners": to_winners,
    "prompts": to_prompts,
}
_UNIQUE: Mapping[DataKind, Callable[[Example], Any]] = {
    "unpaired": lambda e: (e.images[0].name, e.prompts),
    "winners": lambda e: (e.images[0].name, e.prompts),
    "mismatched_captions": lambda e: (e.images[0].name, e.prompts[0]),
    "prompts": lambda e: (e.prompts, e.metadata.get(ROLLOUT, {}).get("seed")),
}
"""Kinds whose examples lists and pairs repeat, and what tells two of them apart."""


def merge_repeats(kind: DataKind, examples: Sequence[Example]) -> list[Example]:
    """Keep each single image (or prompt) once; an image liked in one pair and passed over in another counts as liked.

    The rule for labels is that of Diffusion-KTO's data recipe (arXiv 2404.04465).
    """
    key_of = _UNIQUE.get(kind)
    if key_of is None:
        return list(examples)
    kept: dict[Any, Example] = {}
    for example in examples:
        key = key_of(example)
        liked = example.fields.get("label") == 1.0
        if key not in kept or (liked and kept[key].fields.get("label") == 0.0):
            kept[key] = example if key not in kept else replace(kept[key], fields=example.fields)
    return list(kept.values())


def join_liked_and_disliked(records: Sequence[Record], notes: Counter[str]) -> list[Record]:
    """Join single labelled images of one caption into records of two, liked against disliked, in their order.

    Within a caption the first liked image meets the first disliked one, and so on; images left over are counted.
    """
    by_prompt: dict[str, tuple[list[Record], list[Record]]] = {}
    for record in records:
        if record.label == 0.5:
            notes["ties dropped"] += 1
        else:
            by_prompt.setdefault(record.prompt, ([], []))[0 if record.label else 1].append(record)
    joined = []
    for liked, disliked in by_prompt.values():
        notes["images without a counterpart of the same caption left out"] += abs(len(liked) - len(disliked))
        for good, bad in zip(liked, disliked, strict=False):
            identity = f"{good.id}:{bad.id}"
            joined.append(replace(good, id=identity, images=good.images + bad.images, winner=0, label=None, fields={}))
    return joined


def _preferred(record: Record, options: PairingOptions, notes: Counter[str]) -> list[tuple[int, int]]:
    values = _known(record)
    pairs = pair_indices(values, options.rule, options.margin if record.scores is not None else 0.0)
    if not pairs:
        tied = len(set(values)) < 2
        notes["ties dropped" if tied else "rows within the margin dropped"] += 1
    return pairs


def _known(record: Record) -> list[float]:
    values = utilities(record)
    if values is None or len(values) < 2:
        raise UserError(
            f"record {record.id!r} has {len(record.images)} image(s) and no winner, ranking or scores: "
            "nothing says which image is preferred"
        )
    return values


def _winners(record: Record, notes: Counter[str]) -> list[int]:
    found = winner_indices(record)
    if not found:
        notes["ties dropped" if record.label in (None, 0.5) else "disliked images left out"] += 1
    return found


def _mismatches_of(record: Record) -> tuple[str, ...]:
    if not record.mismatched:
        raise UserError(
            f"record {record.id!r} has no mismatched caption: give a column 'mismatched', or load the data set without "
            "streaming so that captions can be edited"
        )
    return record.mismatched


def _pair_scores(record: Record, pair: tuple[int, int]) -> dict[str, Numbers]:
    if record.scores is None:
        return {}
    values = utilities(replace(record, winner=None, tie=False, ranking=None)) or []
    return {"scores": (values[pair[0]], values[pair[1]])}


def _example(
    record: Record,
    images: tuple[int, ...],
    prompts: tuple[str, ...],
    fields: Mapping[str, Numbers] | None = None,
    alternatives: tuple[str, ...] = (),
) -> Example:
    """Select images of a record; numbers that belong to its images are selected with them."""
    count = len(record.images)
    carried: dict[str, Numbers] = {}
    for name, value in record.fields.items():
        if isinstance(value, tuple) and len(value) == count and images:
            chosen = tuple(value[index] for index in images)
            carried[name] = chosen if len(images) > 1 else chosen[0]  # type: ignore[assignment]
        else:
            carried[name] = value
    whole = len(set(images)) == count
    identity = record.id if whole or not images else f"{record.id}:{'-'.join(map(str, dict.fromkeys(images)))}"
    return Example(
        id=identity,
        prompts=prompts,
        images=tuple(record.images[index] for index in images),
        fields={**carried, **(fields or {})},
        metadata=record.metadata,
        alternatives=alternatives if len(alternatives) > 1 else (),
    )
