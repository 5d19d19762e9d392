"""What a run trains, by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

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
        """Hold other values for a while; the present ones come back, also after an exception."""
        kept = {name: value.clone() for name, value in self.state_dict().items()}
        self.load_state_dict(state)
        try:
            yield
        finally:
            self.load_state_dict(kept)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy values in, whole or in shards.

        Raises:
            UserError: if names or shapes differ.
        """
        if state.keys() != self.named.keys():
            missing, strange = sorted(self.named.keys() - state.keys()), sorted(state.keys() - self.named.keys())
            raise UserError(
                f"the saved weights are not those of this run: {len(missing)} missing (such as {missing[:1]}), "
                f"{len(strange)} unknown (such as {strange[:1]})"
            )
        with torch.no_grad():
            for name, parameter in self.named.items():
                if parameter.shape != state[name].shape:
                    raise UserError(
                        f"saved weight {name} has shape {tuple(state[name].shape)}, this run wants "
                        f"{tuple(parameter.shape)}: was the rank another one?"
                    )
                parameter.copy_(like(state[name], parameter))
