"""Earlier states of the adapter under training: kept in memory, one at a time loaded into a frozen adapter.

The bank holds one further adapter however many states there are, so neither the network nor the device grows during a
run; the states themselves wait on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from diffalign.errors import UserError
from diffalign.policies.adapters import DEFAULT_ADAPTER, AdapterBank

PAST_ADAPTER = "past"
"""Name of the frozen adapter that a state of the pool is loaded into."""


class AdapterPool:
    """States of the adapter "default", oldest first.

    Args:
        size: how many are kept; beyond it the oldest goes. 0 keeps all.
    """

    def __init__(self, size: int = 0) -> None:
        self._size = size
        self._states: list[dict[str, Tensor]] = []
        self._bank: AdapterBank | None = None
        self._loaded: int | None = None

    def __len__(self) -> int:
        return len(self._states)

    def build(self, bank: AdapterBank) -> None:
        """Give the bank the frozen adapter, and take the present weights in as the first state.

        Raises:
            UserError: if no adapter is trained, as in full fine-tuning.
        """
        if DEFAULT_ADAPTER not in bank.names:
            raise UserError("this method keeps earlier states of an adapter: it needs --train_mode lora")
        bank.copy(DEFAULT_ADAPTER, PAST_ADAPTER)
        self._bank = bank
        self.add()

    def add(self) -> None:
        """Take the present weights in."""
        assert self._bank is not None
        now = {name: value.cpu().clone() for name, value in self._bank.state_dict(DEFAULT_ADAPTER).items()}
        self._states.append(now)
        if self._size:
            self._states = self._states[-self._size :]
        self._loaded = None

    def load(self, index: int) -> None:
        """Load a state into the frozen adapter, unless it is there already."""
        assert self._bank is not None
        if self._loaded != index:
            self._bank.load_state_dict(PAST_ADAPTER, self._states[index])
            self._loaded = index

    @contextmanager
    def using(self) -> Iterator[None]:
        """Run the network under the loaded state."""
        assert self._bank is not None
        with self._bank.using(PAST_ADAPTER):
            yield

    def state_dict(self) -> dict[str, Any]:
        """All states, for checkpoints."""
        return {"states": list(self._states)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; :meth:`load` must be called again.

        Raises:
            UserError: if the checkpoint is another method's.
        """
        if set(state) != {"states"}:
            raise UserError(f"the checkpoint holds {sorted(state)} in place of a pool of earlier adapters")
        self._states, self._loaded = list(state["states"]), None
