"""Numeric columns with gaps: NaN where a row has none, in batches of every source."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffalign.data.encode import ImageEncoder
from diffalign.data.fields import field_tensors, with_complete_fields
from diffalign.data.load import load_examples
from diffalign.data.loader import ExampleLoader, LoaderOptions
from diffalign.data.schema import Example
from diffalign.errors import UserError
from tests.data.support import CountingPolicy, encoded, pair

CPU = torch.device("cpu")
NAN = float("nan")


def rows(*numbers: dict[str, Any]) -> list[dict[str, Any]]:
    """Pairs with further columns."""
    return [
        {"id": f"r{i}", "prompt": "x", "images": [encoded(2 * i), encoded(2 * i + 1)], "winner": 1, **columns}
        for i, columns in enumerate(numbers)
    ]


def same(found: torch.Tensor, expected: list[Any]) -> bool:
    return torch.equal(found.nan_to_num(-1), torch.tensor(expected).nan_to_num(-1))


def test_a_stream_may_lack_a_number_in_any_row() -> None:
    from datasets import Dataset

    table = Dataset.from_list(rows({"y": None, "z": None}, {"y": 1.5, "z": [1.0, 2.0]}, {}, {"y": 2.5}))
    stream = load_examples(table.to_iterable_dataset(), "pairs")
    encoder = ImageEncoder(CountingPolicy(), "pairs")  # type: ignore[arg-type]
    loader = ExampleLoader(stream, LoaderOptions(micro_batch=2, accumulation=2, shuffle=False))
    first, second = (encoder(micro).fields for micro in next(iter(loader)))
    assert same(first["y"], [NAN, 1.5])
    assert same(first["z"], [[NAN, NAN], [2.0, 1.0]])  # numbers of images follow them: chosen first
    assert same(second["y"], [NAN, 2.5])
    assert second.keys() == {"y"}


def test_numbers_of_another_shape_are_refused_by_column_and_example() -> None:
    with pytest.raises(UserError, match="column 'y' holds a number in 'pair-0' and 2 numbers in 'pair-2'"):
        field_tensors([pair(0, y=1.0), pair(1), pair(2, y=(1.0, 2.0))], CPU)
    with pytest.raises(UserError, match="column 'y' holds 2 x 3 numbers in 'pair-0' and 2 numbers in 'pair-1'"):
        field_tensors([pair(0, y=((1.0, 2.0, 3.0),) * 2), pair(1, y=(1.0, 2.0))], CPU)


def test_lists_of_other_lengths_have_gaps_of_their_own_length() -> None:
    def listed(count: int, **fields: Any) -> Example:
        return Example(f"{count}-{len(fields)}", ("x",) * count, pair(0).images[:1] * count, fields)

    examples = [listed(2, s=(1.0, 2.0)), listed(3), listed(2), listed(3, s=(1.0, 2.0, 3.0))]
    lengths = [len(example.fields["s"]) for example in with_complete_fields(examples)]  # type: ignore[arg-type]
    assert lengths == [2, 3, 2, 3]
