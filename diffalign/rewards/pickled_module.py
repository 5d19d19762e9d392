"""Tensors of a module that was pickled whole: read without running or importing anything that the pickle names."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.errors import UserError

_ADMITTED = {
    ("collections", "OrderedDict"): collections.OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): torch._utils._rebuild_tensor_v2,  # type: ignore[attr-defined]
    ("torch._utils", "_rebuild_parameter"): torch._utils._rebuild_parameter,  # type: ignore[attr-defined]
}
"""What rebuilds tensors; everything else that a pickle names becomes a husk."""


class _Husk:
    """Stands for an object of any class or the result of any call: holds what it was given and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> _Husk:
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Take an entry of a list-like object."""

    def extend(self, values: Any) -> None:
        """Take entries of a list-like object."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        return _Husk


_READER: Any = ModuleType("husks")
_READER.Unpickler = _Unpickler
_READER.load = lambda file, **options: _Unpickler(file, **options).load()
"""In the place of the module pickle."""


def read_module(path: str | Path) -> dict[str, Tensor]:
    """Read parameters and buffers of a module that ``torch.save(module, path)`` wrote.

    Args:
        path: the file; the module's classes need not exist here.

    Returns:
        name -> tensor, as the module's ``state_dict`` would name them, and buffers that are not persistent.

    Raises:
        UserError: if the file is absent or damaged, or holds no module.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=False, pickle_module=_READER)
    except Exception as problem:
        raise UserError(f"{file} is not a file of torch: {problem}".splitlines()[0]) from problem
    state = dict(_tensors(content, ""))
    if not state:
        raise UserError(f"{file} holds no module; expected what torch.save(module, path) writes")
    return state


def _tensors(module: Any, prefix: str) -> Iterator[tuple[str, Tensor]]:
    parts = getattr(module, "__dict__", {})
    for kind in ("_parameters", "_buffers"):
        for name, value in (parts.get(kind) or {}).items():
            if isinstance(value, Tensor):
                yield prefix + name, value.detach() if isinstance(value, nn.Parameter) else value
    for name, child in (parts.get("_modules") or {}).items():
        yield from _tensors(child, f"{prefix}{name}.")
