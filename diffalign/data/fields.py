"""Numbers of examples as columns of a batch. Data have gaps, tensors have none: what an example lacks is NaN there."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from diffalign.data.loader import HasId, group_of
from diffalign.data.schema import Numbers
from diffalign.errors import UserError


class HasFields(HasId, Protocol):
    """An example that may carry numbers."""

    @property
    def fields(self) -> Mapping[str, Numbers]: ...


E = TypeVar("E", bound=HasFields)


def with_complete_fields(examples: Sequence[E], notes: Counter[str] | None = None) -> list[E]:
    """Give every example the fields that others of its group have, as NaN where it has no number.

    Args:
        examples: of a batch, or of a whole data set.
        notes: how many examples lack a number in which column is added to them.
    """
    blanks: dict[Hashable, dict[str, Numbers]] = {}
    for example in examples:
        known = blanks.setdefault(group_of(example), {})
        known.update({name: _blank(value) for name, value in example.fields.items() if name not in known})
    completed = []
    for example in examples:
        blank = blanks[group_of(example)]
        if len(example.fields) < len(blank):
            missing = blank.keys() - example.fields.keys()
            if notes is not None:
                notes.update(f"examples without a number in column {name!r} (NaN there)" for name in sorted(missing))
            whole: Any = example
            example = replace(whole, fields={**blank, **example.fields})
        completed.append(example)
    return completed


def field_tensors(examples: Sequence[HasFields], device: torch.device) -> dict[str, Tensor]:
    """Return the fields of a batch, each (B, ...) float32; NaN where an example lacks what another one has.

    Raises:
        UserError: if the numbers of a column have another shape in one example than in the next.
    """
    completed = with_complete_fields(examples)
    tensors = {}
    for name, first in completed[0].fields.items():
        for example in completed:
            value = example.fields[name]
            if _shape(value) != _shape(first):
                raise UserError(
                    f"column {name!r} holds {_words(first)} in {completed[0].id!r} and {_words(value)} in "
                    f"{example.id!r}: bring all rows to one form, or leave the column out"
                )
        values = [example.fields[name] for example in completed]
        tensors[name] = torch.tensor(values, dtype=torch.float32, device=device)
    return tensors


def _blank(value: Numbers) -> Numbers:
    return tuple(map(_blank, value)) if isinstance(value, tuple) else math.nan  # type: ignore[arg-type,return-value]


def _shape(value: Numbers) -> tuple[int, ...]:
    return (len(value), *_shape(value[0])) if isinstance(value, tuple) else ()


def _words(value: Numbers) -> str:
    return " x ".join(map(str, _shape(value))) + " numbers" if isinstance(value, tuple) else "a number"
