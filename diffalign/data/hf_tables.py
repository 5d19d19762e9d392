"""Tables over the ``datasets`` library: hub, parquet, webdataset, saved to disk, objects in memory; streams too."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from diffalign.data.image_source import ImageSource
from diffalign.data.table import Table, counted
from diffalign.errors import UserError, nearest

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
_ROWS_AT_ONCE = 1000


def table_of_dataset(data: Any, name: str) -> Table:
    """Wrap a ``datasets.Dataset`` or ``IterableDataset``.

    Raises:
        UserError: for a dictionary of splits.
    """
    import datasets

    if isinstance(data, datasets.IterableDataset):
        return _stream_table(data, name)
    if isinstance(data, Mapping):
        raise UserError(f"{name} has the splits {', '.join(data)}: give one of them, not the whole dictionary")
    features = data.features  # asked for once, as each answer is a copy
    heavy = [column for column, feature in features.items() if _is_heavy(feature)]
    lists = {column for column in heavy if isinstance(features[column], datasets.List | datasets.LargeList)}
    light = data.with_format(None).remove_columns(heavy)
    # Arrow format gives the stored bytes: nothing is decoded and nothing is rewritten, however big the data set.
    views = {column: data.select_columns([column]).with_format("arrow") for column in heavy}

    def rows() -> Iterator[Mapping[str, Any]]:
        for index, row in enumerate(_light_rows(light, len(data))):
            for column, view in views.items():
                row[column] = _cell(view, index, f"{name}, {counted(index)}, {column}", column in lists)
            yield row

    return Table(name, frozenset(data.column_names), rows)


def load_hf(path: str, title: str, split: str, streaming: bool, **arguments: Any) -> Table:
    """Load by ``datasets.load_dataset``.

    Args:
        path: hub name or builder name, as the library understands it.
        title: of the source, for messages.
        split: split to load.
        streaming: read as a stream.
        arguments: further arguments, for example ``data_files``.

    Raises:
        UserError: with the library's reason, if the source cannot be had.
    """
    import datasets

    try:
        data = datasets.load_dataset(path, split=split, streaming=streaming, **arguments)
    except ValueError as error:
        if "split" in str(error).lower():
            raise UserError(f"{title} has no split {split!r}: {error}. Choose one with --train_split") from None
        raise UserError(f"cannot load {title}: {error}") from None
    except (OSError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(
            f"cannot load {title}: {type(error).__name__}: {error}. It is neither a local file or folder nor a data "
            "set that the hub (or its offline cache) gave"
        ) from None
    return table_of_dataset(data, title)


def load_saved(folder: Path, split: str) -> Table:
    """Load what ``save_to_disk`` wrote.

    Raises:
        UserError: if the split does not exist.
    """
    import datasets

    data = datasets.load_from_disk(str(folder))
    if isinstance(data, datasets.DatasetDict):
        if split not in data:
            raise UserError(f"{folder} has no split {split!r}: {nearest(split, data)}")
        data = data[split]
    return table_of_dataset(data, folder.name)


def load_webdataset(files: Sequence[Path], name: str, streaming: bool) -> Table:
    """Load tar shards: files of one key make a row, ``KEY.jpg``, ``KEY.chosen.png``, ``KEY.json``, ``KEY.txt``.

    Image files give columns named by what stands between key and suffix (``chosen``), or ``image``; the fields of the
    JSON file become columns; text files give the caption.
    """
    table = load_hf("webdataset", name, "train", streaming, data_files=[str(path) for path in files])

    def rows() -> Iterator[Mapping[str, Any]]:
        for row in table.rows():
            yield _flat_sample(row)

    first = next(rows(), None)
    if first is None:
        raise UserError(f"{name} holds no sample")
    return Table(name, frozenset(first), rows, streams=streaming)


def _stream_table(data: Any, name: str) -> Table:
    if data.features is not None:  # of generators and mapped streams nothing is known, and nothing can be asked
        data = data.decode(False)
    columns = data.column_names
    if columns is None:
        first = next(iter(data), None)
        if first is None:
            raise UserError(f"{name} is empty: the stream ended before its first row")
        columns = list(first)
    return Table(name, frozenset(columns), lambda: iter(data), streams=True)


def _light_rows(data: Any, count: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of a data set without images, read many at a time; empty ones where it has no column."""
    if not data.column_names:
        yield from ({} for _ in range(count))
        return
    for batch in data.iter(_ROWS_AT_ONCE):
        for cells in zip(*batch.values(), strict=True):
            yield dict(zip(batch, cells, strict=True))


def _is_heavy(feature: Any) -> bool:
    """Whether cells of a column are images, or bytes that may be images: read only when they are used."""
    import datasets

    if isinstance(feature, datasets.List | datasets.LargeList):
        return _is_heavy(feature.feature)
    if isinstance(feature, Mapping):
        return "bytes" in feature
    return isinstance(feature, datasets.Image) or getattr(feature, "dtype", None) in {"binary", "large_binary"}


def _cell(view: Any, index: int, name: str, is_list: bool) -> Any:
    """Return handles on the images of a cell, of which none is read."""
    if is_list:
        stored = _stored(view, index)
        count = len(stored) if stored.is_valid else 0
        return [ImageSource(f"{name}[{place}]", partial(_image_bytes, view, index, place)) for place in range(count)]
    return ImageSource(name, partial(_image_bytes, view, index))


def _stored(view: Any, index: int) -> Any:
    return view[index].column(0)[0]


def _image_bytes(view: Any, index: int, place: int | None = None) -> bytes:
    stored = _stored(view, index)
    return _bytes_of((stored if place is None else stored[place]).as_py())


def _bytes_of(value: Any) -> bytes:
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if value is None:
        raise OSError("there is no image in this row")
    return Path(value).read_bytes() if isinstance(value, str) else value


def _flat_sample(row: Mapping[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {"id": row.get("__key__")}
    for column, value in row.items():
        if column.startswith("__") or value is None:
            continue
        own, _, suffix = column.rpartition(".")
        if f".{suffix.lower()}" in IMAGE_SUFFIXES:
            flat[own or "image"] = value
        elif column == "json":
            flat.update(value)
        elif column == "txt":
            flat["prompt"] = value.strip()
        else:
            flat[column] = value
    return flat
