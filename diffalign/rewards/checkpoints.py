"""Checkpoint files: read without running code, loaded strictly, refused with words."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffalign.errors import UserError

_SHOWN = 4
"""Names listed in an error."""


def read_state(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint: safetensors, or a torch file (its ``state_dict`` entry where it has one).

    Raises:
        UserError: if the file is absent, or holds anything but tensors and plain values.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {file}")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as problem:
        raise UserError(f"{file} is not a checkpoint of plain tensors: {problem}".splitlines()[0]) from problem
    content = content.get("state_dict", content) if isinstance(content, Mapping) else content
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"{file} holds no state dict; expected names with tensors, alone or under 'state_dict'")
    return dict(content)


def load_strictly(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Put a state into a module, every tensor of it and of nothing else.

    Raises:
        UserError: naming what is missing, what is unexpected, and which shapes differ.
    """
    wanted = module.state_dict()
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:_SHOWN])}{', ...' if len(names) > _SHOWN else ''})"
        for kind, names in (
            ("missing", sorted(set(wanted) - set(state))),
            ("unexpected", sorted(set(state) - set(wanted))),
        )
        if names
    ]
    shapes = [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(value.shape)}"
        for name, value in wanted.items()
        if name in state and state[name].shape != value.shape
    ]
    problems += shapes[:_SHOWN]
    if problems:
        raise UserError(f"{where} is not a checkpoint of this scorer: {'; '.join(problems)}")
    module.load_state_dict(state, assign=True)


def read_arrays(path: str | Path) -> Any:
    """Read a pickle of numpy arrays and plain values.

    Raises:
        UserError: if it cannot be read, or names anything but numpy arrays: nothing else that a pickle may name is run.
    """
    try:
        with Path(path).open("rb") as file:
            return _ArraysOnly(file).load()
    except (OSError, pickle.UnpicklingError, EOFError) as problem:
        raise UserError(f"cannot read {path}: {problem}") from problem


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if module == "numpy" and name in ("dtype", "ndarray"):
            return getattr(np, name)
        raise UserError(f"the checkpoint names {module}.{name}; only numpy arrays are read")
