"""One published case: inputs, parameters, what must come out, and how it is compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any

import torch
from torch import Tensor

DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}
KEYS = {"name", "inputs", "params", "expected", "tolerance", "notes"}
PLAIN: UnionType = float | int | str | None
"""Anything but a record."""

Kind = None | type | UnionType | Mapping[str, Any] | Collection[object]
"""What a value, or each entry of a list, may be: None a number, a type one of its instances (``str`` a text, ``dict`` a
record whose keys are read one by one), a mapping a record with some of these keys, another collection one of these."""


@dataclass(frozen=True)
class GoldenCase:
    """A case of a golden file.

    Args:
        file: path of the file relative to the golden folder, with slashes.
        name: unique in its file.
        inputs, params: as stored; see :meth:`tensor`.
        expected: name -> number, nested list, text, truth value or record.
        tolerance: a number passes if ``|got - want| <= tolerance + tolerance * |want|``.
        notes: what the inputs are.
    """

    file: str
    name: str
    inputs: Mapping[str, Any]
    params: Mapping[str, Any]
    expected: Mapping[str, Any]
    tolerance: float
    notes: str = ""

    @staticmethod
    def of(file: str, record: Mapping[str, Any]) -> GoldenCase:
        """Read a case as stored.

        Raises:
            ValueError: for keys that a case does not have, or nothing to compare.
        """
        if odd := set(record) - KEYS:
            raise ValueError(f"{file}: unknown keys of a case: {sorted(odd)}")
        if not record["expected"]:
            raise ValueError(f"{file}: the case expects nothing")
        return GoldenCase(file=file, **record)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the inputs: ``params.dtype``, else float64."""
        return DTYPES[self.params.get("dtype", "torch.float64")]

    def tensor(self, key: str) -> Tensor:
        """Return an input as a tensor of the case's type."""
        return torch.tensor(self.inputs[key], dtype=self.dtype)

    def integers(self, key: str) -> Tensor:
        """Return an input as int64.

        Raises:
            ValueError: for numbers with a fraction, which would pass for others.
        """
        values = torch.tensor(self.inputs[key], dtype=torch.float64)
        if not bool((values == values.round()).all()):
            raise ValueError(f"inputs.{key} is {self.inputs[key]!r}: expected whole numbers")
        return values.long()

    def indices(self, key: str, count: int) -> Tensor:
        """Return an input as int64 in 0 .. count - 1.

        Raises:
            ValueError: for other numbers: negative ones would count from the end.
        """
        values = self.integers(key)
        if bool(((values < 0) | (values >= count)).any()):
            raise ValueError(f"inputs.{key} is {self.inputs[key]!r}: expected whole numbers from 0 to {count - 1}")
        return values

    def known(self, inputs: Collection[str] | Mapping[str, Kind], params: Mapping[str, Kind]) -> None:
        """Refuse what the calling module does not know, so that no case passes by being misread.

        Args:
            inputs: name -> kind of all inputs that are used; or their names alone, where none is a record.
            params: name -> kind; ``dtype`` is always known.

        Raises:
            ValueError: for another input, parameter or key of a record, or a value of another kind.
        """
        kinds = inputs if isinstance(inputs, Mapping) else dict.fromkeys(inputs, PLAIN)
        refuse_unknown(self.inputs, kinds, "inputs")
        refuse_unknown(self.params, {"dtype": DTYPES.keys(), **params}, "params")

    def check(self, got: Mapping[str, Any]) -> None:
        """Compare every expected key.

        Raises:
            AssertionError: naming the first differing value.
        """
        missing = set(self.expected) - set(got)
        assert not missing, f"not computed: {sorted(missing)}"
        for key, want in self.expected.items():
            compare(got[key], want, self.tolerance, key)


def refuse_unknown(value: Any, kind: Kind, where: str) -> None:
    """Raise ValueError for a value that is not of a kind; ``where`` names it."""
    if isinstance(value, list):
        for entry in value:
            refuse_unknown(entry, kind, where)
    elif isinstance(kind, Mapping):
        if not isinstance(value, Mapping) or not set(value) <= set(kind):
            raise ValueError(f"{where} is {value!r}: expected a record with keys among {sorted(kind)}")
        for key, entry in value.items():
            refuse_unknown(entry, kind[key], f"{where}.{key}")
    elif kind is None:
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ValueError(f"{where} is {value!r}: expected a number")
    elif isinstance(kind, (type, UnionType)):
        if not isinstance(value, kind):
            raise ValueError(f"{where} is {value!r}: expected {kind}")
    elif isinstance(value, Mapping) or value not in kind:
        raise ValueError(f"{where} is {value!r}: expected one of {sorted(map(str, kind))}")


def compare(got: Any, want: Any, tolerance: float, where: str) -> None:
    """Compare a value with a stored one: shapes, texts and truth values exactly, numbers within the tolerance."""
    if isinstance(got, Tensor):
        got = got.detach().tolist()
    if isinstance(want, Mapping):
        assert isinstance(got, Mapping), f"{where}: a record was expected, not {got!r}"
        assert set(got) == set(want), f"{where}: has {sorted(got)}, expected {sorted(want)}"
        for key, value in want.items():
            compare(got[key], value, tolerance, f"{where}.{key}")
    elif isinstance(want, list):
        assert isinstance(got, Sequence), f"{where}: a list was expected, not {got!r}"
        assert not isinstance(got, str), f"{where}: a list was expected, not {got!r}"
        assert len(got) == len(want), f"{where}: {len(got)} entries, expected {len(want)}"
        for index, (left, right) in enumerate(zip(got, want, strict=True)):
            compare(left, right, tolerance, f"{where}[{index}]")
    elif isinstance(want, bool) or want is None or isinstance(want, str):
        assert type(got) is type(want), f"{where}: {got!r}, expected {want!r}"
        assert got == want, f"{where}: {got!r}, expected {want!r}"
    else:
        assert isinstance(got, (int, float)), f"{where}: {got!r}, expected the number {want}"
        assert not isinstance(got, bool), f"{where}: {got!r}, expected the number {want}"
        close = got == want or abs(got - want) <= tolerance + tolerance * abs(want)
        assert close, f"{where}: {got}, expected {want} within {tolerance}"
