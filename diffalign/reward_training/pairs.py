"""Pairs for scorers: ties are kept, captions are held out as wholes."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from diffalign.data.held_out import same_caption
from diffalign.data.image_source import ImageSource
from diffalign.data.pairing import utilities
from diffalign.data.readers import BUNDLED, SourceOptions, open_records
from diffalign.data.schema import Record
from diffalign.diffusion.random import derive_seed
from diffalign.errors import UserError

EVERYONE = "everyone"
"""The user of pairs that name none."""


@dataclass(frozen=True)
class ScorerPair:
    """Two images of a caption and what somebody thought of them.

    Args:
        prompt: the caption.
        first, second: the images.
        label: 1 if the first is preferred, 0 if the second, 1/2 for a tie.
        user: who said so.
        siblings: pairs of this caption in the same part of the data.
    """

    prompt: str
    first: ImageSource
    second: ImageSource
    label: float
    user: str = EVERYONE
    siblings: int = 1

    @property
    def tied(self) -> bool:
        """Whether neither image is preferred."""
        return self.label == 0.5


def read_pairs(source: str, options: SourceOptions, user_column: str = "user") -> list[ScorerPair]:
    """Read all pairs of a data set; a list gives every pair of its images.

    Of the bundled data the lists are read: their pairs were chosen so that proxy and verifier never disagree on one.

    Args:
        source: as for the training of models.
        options: split, columns.
        user_column: a column, or a key of the metadata, that tells people apart.

    Raises:
        UserError: for a source that cannot be read or has no pair.
    """
    reader = open_records(source, "ranked_lists" if source == BUNDLED else "pairs", options)
    pairs: list[ScorerPair] = []
    for index, row in enumerate(reader.table.rows()):
        record = reader.read(index, row)
        user = row.get(user_column, record.metadata.get(user_column))
        pairs += pairs_of(record, EVERYONE if user is None else str(user))
    if not pairs:
        raise UserError(f"{source} holds no pair of images that somebody compared")
    return pairs


def pairs_of(record: Record, user: str = EVERYONE) -> list[ScorerPair]:
    """Compare all images of a record, two by two; ``user`` did so."""
    values = utilities(record) or []
    return [
        ScorerPair(
            record.prompt,
            record.images[i],
            record.images[j],
            0.5 if values[i] == values[j] else float(values[i] > values[j]),
            user,
        )
        for i, j in itertools.combinations(range(len(values)), 2)
    ]


def split_captions(pairs: Sequence[ScorerPair], held_out: float) -> tuple[list[ScorerPair], list[ScorerPair]]:
    """Divide pairs into those to train on and those held out, by caption.

    A caption always falls alike, whatever the other captions are, in whatever case and spacing it is written.

    Raises:
        UserError: if nothing is left to train on.
    """
    chosen = [derive_seed("held out", same_caption(pair.prompt)) / 2**63 < held_out for pair in pairs]
    trained = _counted(pair for pair, out in zip(pairs, chosen, strict=True) if not out)
    if not trained:
        raise UserError(f"all {len(pairs)} pairs fell into the held-out share {held_out:g}; lower it")
    return trained, _counted(pair for pair, out in zip(pairs, chosen, strict=True) if out)


def draw_batch(pairs: Sequence[ScorerPair], step: int, batch_size: int, seed: int) -> list[ScorerPair]:
    """Return the pairs of an optimizer step, from 0: every epoch in an order of its own, whatever came before."""
    batch: list[ScorerPair] = []
    position = step * batch_size
    while len(batch) < batch_size:
        epoch, offset = divmod(position, len(pairs))
        generator = torch.Generator().manual_seed(derive_seed(seed, "order", epoch))
        order = torch.randperm(len(pairs), generator=generator)[offset : offset + batch_size - len(batch)]
        batch += [pairs[row] for row in order.tolist()]
        position += len(order)
    return batch


def _counted(pairs: Iterable[ScorerPair]) -> list[ScorerPair]:
    found = list(pairs)
    counts = Counter(pair.prompt for pair in found)
    return [
        ScorerPair(pair.prompt, pair.first, pair.second, pair.label, pair.user, counts[pair.prompt]) for pair in found
    ]
