"""Named LoRA adapters on one network: switched by flags, never by a second copy of the weights.

The libraries' own switches walk every module and flip ``requires_grad``: slow, unfriendly to wrapped and compiled
modules, and backward then yields no gradient without any error. Here the adapter layers are collected once and only
their flags change, so gradients keep working whatever the order of passes, and backward in a wrong state raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from diffalign.errors import UserError, unknown
from diffalign.policies.fingerprint import fingerprint

DEFAULT_ADAPTER = "default"
"""Name of the adapter that a run trains unless its method asks for others."""
START_ADAPTER = "start"
"""Name of the frozen adapter that a model was loaded with: the start of training, hence its reference."""


@dataclass(frozen=True)
class LoraSettings:
    """Shape of an adapter.

    Args:
        rank: inner width of the two factors (16; diffusers' scripts use 4 to 16).
        alpha: numerator of the scale ``alpha / rank``; 0 means equal to the rank, hence scale 1.
        dropout: dropout before the first factor, while training.
        targets: names or dotted suffixes of modules to attach to; empty for the model family's own.
        init: distribution of the first factor, the second is zero ("gaussian" as in diffusers' scripts).
    """

    rank: int = 16
    alpha: float = 0
    dropout: float = 0.0
    targets: tuple[str, ...] = ()
    init: Literal["gaussian", "kaiming"] = "gaussian"

    @property
    def scale_numerator(self) -> float:
        """Alpha with the shorthand 0 resolved."""
        return self.alpha or self.rank


class AdapterBank:
    """All adapters of one network, by name; at most one is active at a time.

    Adapter weights are float32 (at least) whatever the type of the network. Adapters are added before the first step,
    never later: optimizer and checkpoints know their weights by then.

    Args:
        module: the network; adding an adapter freezes its own weights.
        default_targets: gives the targets of settings that name none.

    Attributes:
        version: rises whenever modules come to the network or leave it.
    """

    def __init__(self, module: nn.Module, default_targets: Callable[[], Sequence[str]] = tuple) -> None:
        self._module = module
        self._default_targets = default_targets
        self._settings: dict[str, LoraSettings] = {}
        self._trainable: dict[str, bool] = {}
        self._layers: dict[str, BaseTunerLayer] = {}
        self._active: str | None = None
        self._off = False
        self.version = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all adapters, in the order they were added."""
        return tuple(self._settings)

    @property
    def active(self) -> str | None:
        """The adapter that passes run under now; None while switched off, or where there is none."""
        return None if self._off else self._active

    def settings(self, name: str) -> LoraSettings:
        """Return an adapter's settings, with its targets filled in."""
        self._require(name)
        return self._settings[name]

    def add(self, name: str, settings: LoraSettings | None = None, trainable: bool = True, seed: int = 0) -> None:
        """Attach a new adapter that leaves the network's function as it is; the first one becomes active.

        Args:
            name: a name without dots.
            settings: shape; the defaults if omitted.
            trainable: False keeps its weights without gradient, always, and without dropout: its values are a
                reference's.
            seed: of the initial values; the global generator is left untouched.

        Raises:
            UserError: if the name is taken, or a target matches no module.
        """
        settings = settings or LoraSettings()
        if name in self._settings or "." in name:
            raise UserError(f"cannot add an adapter named {name!r}: the name is taken or holds a dot")
        targets = tuple(settings.targets) or tuple(self._default_targets())
        self._check_targets(targets)
        settings = replace(settings, targets=targets, dropout=settings.dropout if trainable else 0.0)
        self.version += 1
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self._inject(name, settings)
        self._settings[name] = settings
        self._trainable[name] = trainable
        self._layers = {path: m for path, m in self._module.named_modules() if isinstance(m, BaseTunerLayer)}
        for existing in self.names:  # the injection has touched the flags of all
            for parameter in self.parameters(existing):
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
                parameter.requires_grad_(self._trainable[existing])
        self._module.train(self._module.training)
        self._switch(self._active or name, self._off)

    def activate(self, name: str) -> None:
        """Make an adapter the active one until further notice."""
        self._require(name)
        self._switch(name, self._off)

    @contextmanager
    def using(self, name: str) -> Iterator[None]:
        """Run under another adapter; what held before comes back, also after an exception."""
        self._require(name)
        with self._state(name, off=False):
            yield

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """Run the bare network. Backward through a policy's output inside this context raises.

        Without any adapter this does nothing for a frozen network, which is bare already.

        Raises:
            RuntimeError: if there is no adapter while the network's own weights train: the bare network is gone then,
                and only a frozen copy can stand for it.
        """
        if not self._settings and any(p.requires_grad for p in self._module.parameters()):
            raise RuntimeError(
                "there is no adapter to switch off and the weights themselves train: the start of training survives "
                "only in a frozen copy (diffalign.references.FrozenCopy)"
            )
        with self._state(self._active, off=True):
            yield

    def guard(self, output: Tensor) -> Tensor:
        """Make backward through ``output`` raise unless the adapters stand then as they stand now.

        Policies pass their predictions through here. With adapters off, or others on, backward would recompute
        checkpointed blocks in another state than the forward pass and give wrong gradients or none.
        """
        if output.requires_grad and self._settings:
            active = self.active

            def check(gradient: Tensor) -> None:
                self.assert_ready_for_backward()
                if self.active != active:
                    raise RuntimeError(
                        f"backward under adapter {self.active!r} of a pass made under {active!r}: "
                        "run both inside the same AdapterBank.using(...)"
                    )

            output.register_hook(check)
        return output

    def assert_ready_for_backward(self) -> None:
        """Raise a RuntimeError where backward is forbidden: while the adapters are switched off."""
        if self._off and self._settings:
            raise RuntimeError(
                "backward while the adapters are switched off: leave AdapterBank.disabled() first "
                "(reference values need no graph)"
            )

    def parameters(self, name: str = DEFAULT_ADAPTER) -> list[nn.Parameter]:
        """Return an adapter's weights, in the network's module order."""
        return list(self._named_parameters(name).values())

    def state_dict(self, name: str = DEFAULT_ADAPTER) -> dict[str, Tensor]:
        """Return an adapter's weights under peft's names without the adapter's: ``PATH.lora_A.weight``; no copies."""
        return {key: parameter.detach() for key, parameter in self._named_parameters(name).items()}

    def load_state_dict(self, name: str, state: Mapping[str, Tensor]) -> None:
        """Copy weights into an adapter, keeping its type and device.

        Raises:
            UserError: if names or shapes differ, as with another rank, other targets or another model.
        """
        parameters = self._named_parameters(name)
        if parameters.keys() != state.keys():
            missing, extra = sorted(parameters.keys() - state.keys()), sorted(state.keys() - parameters.keys())
            raise UserError(
                f"weights do not fit adapter {name!r}: {len(missing)} are missing (such as {missing[:1]}) and "
                f"{len(extra)} are unknown (such as {extra[:1]}); were they made for other targets or another model?"
            )
        for key, parameter in parameters.items():
            if parameter.shape != state[key].shape:
                raise UserError(
                    f"weights do not fit adapter {name!r}: {key} has shape {tuple(state[key].shape)}, "
                    f"the adapter (rank {self._settings[name].rank}) wants {tuple(parameter.shape)}"
                )
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(state[key])

    def copy(self, source: str, target: str, trainable: bool = False) -> None:
        """Copy the weights of one adapter into another, which is added (``trainable`` or not) if it does not exist."""
        if target not in self._settings:
            self.add(target, self.settings(source), trainable)
        self.load_state_dict(target, self.state_dict(source))

    def merge(self, name: str) -> None:
        """Fold an adapter into the network's weights, and take all adapters off: for export, there is no way back."""
        self._require(name)
        self._switch(name, off=False)
        self.version += 1
        for path, layer in self._layers.items():
            layer.merge(adapter_names=[name])
            parent, _, child = path.rpartition(".")
            setattr(self._module.get_submodule(parent), child, layer.get_base_layer())
        self._settings, self._trainable, self._layers, self._active = {}, {}, {}, None

    def fingerprint(self, name: str = DEFAULT_ADAPTER) -> str:
        """Return 16 hexadecimal digits that depend on every weight, its name and the scale; reads all weights."""
        settings = self.settings(name)
        return fingerprint(self.state_dict(name).items(), f"{settings.scale_numerator}/{settings.rank}")

    def _inject(self, name: str, settings: LoraSettings) -> None:
        config = LoraConfig(
            r=settings.rank,
            lora_alpha=settings.scale_numerator,  # type: ignore[arg-type]  # peft multiplies, fractions are fine
            lora_dropout=settings.dropout,
            target_modules=list(settings.targets),
            init_lora_weights="gaussian" if settings.init == "gaussian" else True,
        )
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")  # several are wanted here
            inject_adapter_in_model(config, self._module, adapter_name=name)

    def _named_parameters(self, name: str) -> dict[str, nn.Parameter]:
        self._require(name)
        found: dict[str, nn.Parameter] = {}
        for path, layer in self._layers.items():
            for kind in layer.adapter_layer_names:
                entries = getattr(layer, kind)
                if name not in entries:
                    continue
                if isinstance(entries[name], nn.Parameter):  # embeddings
                    found[f"{path}.{kind}"] = entries[name]
                else:
                    found.update({f"{path}.{kind}.{key}": p for key, p in entries[name].named_parameters()})
        return found

    def _check_targets(self, targets: Sequence[str]) -> None:
        modules = self._module.named_modules()
        paths = [path for path, module in modules if isinstance(getattr(module, "weight", None), nn.Parameter)]
        known = {part for path in paths for part in (path, path.rsplit(".", 1)[-1], ".".join(path.split(".")[-2:]))}
        if not targets:
            raise UserError("an adapter needs targets: name modules to attach to")
        for target in targets:
            if not any(path == target or path.endswith(f".{target}") for path in paths):
                raise unknown("adapter target", target, known)

    @contextmanager
    def _state(self, active: str | None, off: bool) -> Iterator[None]:
        before = self._active, self._off
        self._switch(active, off)
        try:
            yield
        finally:
            self._switch(*before)

    def _switch(self, active: str | None, off: bool) -> None:
        self._active, self._off = active, off
        for layer in self._layers.values():
            # the public setters of peft also flip requires_grad, which must not happen here; Module.__setattr__ would
            # take most of the time
            flags = vars(layer)
            flags["_disable_adapters"] = off
            flags["_active_adapter"] = [] if active is None else [active]

    def _require(self, name: str) -> None:
        if name not in self._settings:
            raise unknown("adapter", name, self._settings)
