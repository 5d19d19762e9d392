"""What a run trains, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffalign.errors import UserError
from diffalign.policies.base import BasePolicy
from diffalign.strategies.base import ParameterGroup, Strategy
from diffalign.training.sharding import like


class Trainables:
    """The trained parameters: those of the policy, or those a strategy brings.

    Raises:
        UserError: if there is nothing to train, or a parameter is kept in half precision, where small updates vanish.
    """

    def __init__(self, strategy: Strategy, policy: BasePolicy) -> None:
        if strategy.spec.trains == "own":
            self.groups = strategy.parameters()
            self.named: dict[str, nn.Parameter] = {
                f"own.{g}.{i}": p for g, group in enumerate(self.groups) for i, p in enumerate(group.parameters)
            }
        else:
            self.named = {name: p for name, p in policy.module.named_parameters() if p.requires_grad}
            self.groups = [ParameterGroup(list(self.named.values()))]
        if not self.named:
            raise UserError("nothing to train: no parameter of the model requires a gradient")
        half = [name for name, p in self.named.items() if p.dtype in (torch.float16, torch.bfloat16)]
        if half:
            raise UserError(f"trained parameters must be float32, but {half[0]} is {self.named[half[0]].dtype}")

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of them, in a fixed order."""
        return list(self.named.values())

    @property
    def count(self) -> int:
        """Number of trained numbers."""
        return sum(p.numel() for p in self.parameters)

    def state_dict(self) -> dict[str, Tensor]:
        """Their values, not copied; in shards where the network is."""
        return {name: p.detach() for name, p in self.named.items()}

    @contextmanager
    def holding(self, state: Mapping[str, Tensor]) -> Iterator[None]:
        """Hold other values for a while; the present ones come back, also after an exception.

        Where a value lies as its parameter does, the parameter takes it in itself, without a copy: nothing may write to
        parameters meanwhile. Elsewhere, and in shards, values are copied; what they replace waits where they came from.

        Raises:
            UserError: if names or shapes differ; nothing has changed then.
        """
        self._require_fit(state)
        kept: dict[str, Tensor] = {}
        try:
            for name, parameter in self.named.items():
                kept[name] = _take_in(parameter, state[name])
            yield
        finally:
            for name, value in kept.items():
                _take_in(self.named[name], value, keep=False)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy values in, whole or in shards.

        Raises:
            UserError: if names or shapes differ.
        """
        self._require_fit(state)
        with torch.no_grad():
            for name, parameter in self.named.items():
                parameter.copy_(like(state[name], parameter))

    def _require_fit(self, state: Mapping[str, Tensor]) -> None:
        if state.keys() != self.named.keys():
            missing, strange = sorted(self.named.keys() - state.keys()), sorted(state.keys() - self.named.keys())
            raise UserError(
                f"the saved weights are not those of this run: {len(missing)} missing (such as {missing[:1]}), "
                f"{len(strange)} unknown (such as {strange[:1]})"
            )
        for name, parameter in self.named.items():
            if parameter.shape != state[name].shape:
                raise UserError(
                    f"saved weight {name} has shape {tuple(state[name].shape)}, this run wants "
                    f"{tuple(parameter.shape)}: was the rank another one?"
                )


@torch.no_grad()
def _take_in(parameter: nn.Parameter, value: Tensor, keep: bool = True) -> Tensor:
    """Give a parameter a value; return the one it had, if that is to be kept."""
    whole = not isinstance(parameter, DTensor) and not isinstance(value, DTensor)
    if whole and (value.device, value.dtype, value.stride()) == (parameter.device, parameter.dtype, parameter.stride()):
        before, parameter.data = parameter.data, value.detach()  # optimizers know parameters as objects
        return before
    before = parameter.detach()
    if keep:
        before = before.to(value.device, copy=True) if whole else before.clone()
    parameter.copy_(like(value, parameter))
    return before
