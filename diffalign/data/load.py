"""The front door: from a source to the examples of a kind."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from diffalign.data.captions import mismatch_captions
from diffalign.data.fields import with_complete_fields
from diffalign.data.image_source import ImageSource, UnreadableImage
from diffalign.data.pairing import (
    CONVERSIONS,
    PairingOptions,
    join_liked_and_disliked,
    merge_repeats,
    winner_indices,
)
from diffalign.data.prefetch import mapped
from diffalign.data.readers import SourceOptions, open_records
from diffalign.data.schema import SKIPPED, Example, ExampleSet, Record, StreamSet, kind_info
from diffalign.data.table import RowReader
from diffalign.data.team import Alone, Progress, Team, share_of
from diffalign.data.transforms import aspect_buckets, assign_bucket
from diffalign.errors import UserError
from diffalign.strategies.base import DataKind

_NEEDS_MISMATCH = frozenset({"caption_pairs", "mismatched_captions"})
_NEEDS_PREFERENCE = frozenset({"pairs", "caption_pairs", "ranked_lists"})


def load_examples(source: Any, kind: DataKind, options: SourceOptions | None = None) -> ExampleSet[Example] | StreamSet:
    """Load a data set as examples of a kind.

    Args:
        source: "bundled", "rendered", a file or folder, a hub name (``OWNER/NAME``), a ``datasets`` object, a list of
            rows, or an :class:`ExampleSet` of that kind, which is returned as it is.
        kind: what the method needs (``strategy.spec.data``).
        options: split, columns, pairing.

    Returns:
        the examples, with counts of all that was left out; a stream when ``streaming`` is set.

    Raises:
        UserError: one message that names source, row and column, what is there and what was expected.

    Example::

        dataset = load_examples("pairs.jsonl", "pairs", SourceOptions(column_map={"prompt": "caption"}))
        print(len(dataset), describe_notes(dataset.notes))
    """
    kind_info(kind)
    options = options or SourceOptions()
    if isinstance(source, ExampleSet | StreamSet):
        if source.kind != kind:
            raise UserError(
                f"{source.name} holds {source.kind.replace('_', ' ')}, but {kind.replace('_', ' ')} are needed"
            )
        return source
    reader = open_records(source, kind, options)
    if reader.table.streams:
        return _stream(reader, kind, options)
    records = list(reader)
    if not records:
        raise UserError(f"{reader.table.name} is empty: it holds no row")
    examples, notes = examples_from_records(records, kind, options.pairing, options.seed)
    if options.max_samples:
        examples = examples[: options.max_samples]
    empty: ExampleSet[Example] = ExampleSet(kind, [], reader.table.name, reader.table.notes, reader.table.held_out)
    return empty.with_examples(examples, notes)


def examples_from_records(
    records: Sequence[Record], kind: DataKind, pairing: PairingOptions | None = None, seed: int = 0
) -> tuple[list[Example], Mapping[str, int]]:
    """Convert records to examples of a kind.

    Args:
        records: the records.
        kind: the kind.
        pairing: how several images of a caption become pairs.
        seed: decides how captions are edited where the kind needs mismatched ones and the records have none.

    Returns:
        the examples and reason -> number of records (or images) left out.
    """
    notes: Counter[str] = Counter()
    if kind in _NEEDS_PREFERENCE and all(record.label is not None and len(record.images) == 1 for record in records):
        records = join_liked_and_disliked(records, notes)
    if kind in _NEEDS_MISMATCH:
        records = _with_mismatched_captions(records, kind, seed)
    convert = CONVERSIONS[kind]
    found = [example for record in records for example in convert(record, pairing or PairingOptions(), notes)]
    examples = with_complete_fields(merge_repeats(kind, found), notes)
    return examples, {reason: count for reason, count in notes.items() if count}


def drop_unreadable(
    dataset: ExampleSet[Example], strict: bool = False, team: Team | None = None, progress: Progress | None = None
) -> ExampleSet[Example]:
    """Decode every image once and leave out the examples whose images cannot be decoded, counted.

    A data set that :meth:`ImageEncoder.precompute` goes through needs no such pass.

    Args:
        dataset: the examples.
        strict: refuse such images instead.
        team: processes among which the images are shared out.
        progress: told how far this process is.

    Raises:
        UnreadableImage: naming the first such image when ``strict`` is set.
        UserError: if no example is left.
    """
    team = team or Alone()
    images = share_of(team, _images(dataset), 1)

    def decode() -> set[str]:
        bad = set()
        for done, (image, error) in enumerate(zip(images, mapped(_decoding_error, images), strict=True)):
            if error is not None and strict:
                raise error
            if error is not None:
                bad.add(image.name)
            if progress is not None:
                progress("images decoded", done + 1, len(images))
        return bad

    bad = set().union(*team.together(decode))
    kept = [e for e in dataset.examples if not any(image.name in bad for image in e.images)]
    return dataset.with_examples(kept, {SKIPPED: len(dataset) - len(kept)})


def with_aspect_buckets(
    dataset: ExampleSet[Example], resolution: tuple[int, int], max_ratio: float = 2.0, team: Team | None = None
) -> ExampleSet[Example]:
    """Give each example the training size nearest to the shape of its images: one size for all images of an example.

    Reads the header of every image; examples with an image that has none keep the run's own size, until they are left
    out where images are decoded.

    Args:
        dataset: the examples.
        resolution: (height, width) whose area all sizes share.
        max_ratio: longest side over shortest side.
        team: processes among which the images are shared out.
    """
    team = team or Alone()
    buckets = aspect_buckets(resolution, max_ratio)
    images = share_of(team, _images(dataset), 1)
    names = [image.name for image in images]
    parts = team.together(lambda: dict(zip(names, mapped(_size, images), strict=True)))
    sizes = {name: size for part in parts for name, size in part.items()}
    examples = []
    for example in dataset.examples:
        known = [size for image in example.images if (size := sizes[image.name]) is not None]
        whole = len(known) == len(example.images) > 0
        examples.append(replace(example, size=assign_bucket(known, buckets) if whole else None))
    return replace(dataset, examples=examples)


def _images(dataset: ExampleSet[Example]) -> list[ImageSource]:
    return list({image.name: image for example in dataset.examples for image in example.images}.values())


def _size(image: ImageSource) -> tuple[int, int] | None:
    try:
        return image.size()
    except UnreadableImage:
        return None


def _decoding_error(image: ImageSource) -> UnreadableImage | None:
    try:
        image.decode()
    except UnreadableImage as error:
        return error
    return None


def _with_mismatched_captions(records: Sequence[Record], kind: DataKind, seed: int) -> list[Record]:
    """Edit captions where the records bring neither a mismatched one nor (for pairs) captions of their own."""
    own = [bool(record.mismatched) or (kind == "caption_pairs" and record.captions is not None) for record in records]
    if all(own):
        return list(records)
    # One edit for each good image: the same image in several pairs must not gather several mismatched captions.
    places = {_good_images(record): index for index, record in reversed(list(enumerate(records)))}
    edited = mismatch_captions([records[index].prompt for index in places.values()], seed)
    caption_of = dict(zip(places, edited, strict=True))
    return [
        record if has else replace(record, mismatched=(caption_of[_good_images(record)],))
        for record, has in zip(records, own, strict=True)
    ]


def _good_images(record: Record) -> tuple[str, ...]:
    return record.prompt, *(record.images[index].name for index in winner_indices(record))


def _stream(reader: RowReader, kind: DataKind, options: SourceOptions) -> StreamSet:
    notes: Counter[str] = Counter()
    convert = CONVERSIONS[kind]

    def found() -> Iterator[Example]:
        in_this_pass: Counter[str] = Counter()
        for record in reader:
            yield from convert(record, options.pairing, in_this_pass)
            for reason, count in in_this_pass.items():  # passes see the same rows: none counts twice
                notes[reason] = max(notes[reason], count)

    return StreamSet(kind, lambda: itertools.islice(found(), options.max_samples or None), reader.table.name, notes)
