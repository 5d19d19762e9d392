"""One published case: inputs, parameters, what must come out, and how it is compared."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

DTYPES = {"torch.float32": torch.float32, "torch.float64": torch.float64}
KEYS = {"name", "inputs", "params", "expected", "tolerance", "notes"}


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
            ValueError: for keys that a case does not have.
        """
        if odd := set(record) - KEYS:
            raise ValueError(f"{file}: unknown keys of a case: {sorted(odd)}")
        return GoldenCase(file=file, **record)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the inputs: ``params.dtype``, else float64."""
        return DTYPES[self.params.get("dtype", "torch.float64")]

    def tensor(self, key: str) -> Tensor:
        """Return an input as a tensor of the case's type."""
        return torch.tensor(self.inputs[key], dtype=self.dtype)

    def integers(self, key: str) -> Tensor:
        """Return an input as int64."""
        return torch.tensor(self.inputs[key], dtype=torch.long)

    def known(self, inputs: Collection[str], params: Mapping[str, Collection[object] | None]) -> None:
        """Refuse what the calling module does not know, so that no case passes by being misread.

        Args:
            inputs: names of all inputs that are used.
            params: name -> the values it may take, or None for any number or record; ``dtype`` is always known.

        Raises:
            ValueError: for another input or parameter, or a text value that is not listed.
        """
        allowed = {"dtype": DTYPES.keys(), **params}
        if odd := set(self.inputs) - set(inputs):
            raise ValueError(f"unknown inputs: {sorted(odd)}")
        if odd := set(self.params) - set(allowed):
            raise ValueError(f"unknown parameters: {sorted(odd)}")
        for name, value in self.params.items():
            values = allowed[name]
            if (values is not None and value not in values) or (values is None and isinstance(value, str)):
                raise ValueError(f"unknown value of parameter {name!r}: {value!r}")

    def check(self, got: Mapping[str, Any]) -> None:
        """Compare every expected key.

        Raises:
            AssertionError: naming the first differing value.
        """
        missing = set(self.expected) - set(got)
        assert not missing, f"not computed: {sorted(missing)}"
        for key, want in self.expected.items():
            compare(got[key], want, self.tolerance, key)


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
