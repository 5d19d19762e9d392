"""What a model must be able to do to be aligned; one thin subclass a model family.

A policy wraps components loaded by diffusers (or transformers). It knows nothing of methods, losses or data sets.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from diffalign.batch import Condition
from diffalign.diffusion.process import NoiseProcess
from diffalign.errors import UserError
from diffalign.policies.adapters import AdapterBank
from diffalign.policies.fingerprint import fingerprint


def _parts(module: nn.Module) -> list[nn.Module]:
    """Return a module and all below it."""
    parts = [module]
    for part in parts:  # grows meanwhile
        parts.extend(part.children())
    return parts


def _set_mode(parts: Sequence[nn.Module], training: bool) -> None:
    """Set the mode past ``Module.__setattr__``, which takes most of the time of ``eval`` in a large network."""
    for part in parts:
        vars(part)["training"] = training


class BasePolicy(ABC):
    """What the loop needs of any policy, image or text.

    Args:
        module: the network under training (the denoiser, the language model), never wrapped.
        device, dtype: where inputs and outputs are, and the inputs' type, if not those of the network.
    """

    def __init__(self, module: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None) -> None:
        self.module = module
        self._device, self._dtype = device, dtype
        self._known: tuple[nn.Module, int, list[nn.Module]] | None = None
        self.adapters = AdapterBank(module, lambda: self.lora_targets)

    @property
    def device(self) -> torch.device:
        """Where inputs are expected and outputs come out: where the network's parameters live, as a rule."""
        return self._device or next(self.module.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the frozen weights, which inputs are given."""
        return self._dtype or next(self.module.parameters()).dtype

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Evaluate without gradient and in eval mode (no adapter dropout); the mode of each module comes back."""
        training = [part for part in self._modules() if part.training]
        _set_mode(training, False)
        try:
            with torch.no_grad():
                yield
        finally:
            _set_mode(training, True)

    def _modules(self) -> list[nn.Module]:
        """Return the network and all modules below it, looked up anew only where adapters have changed what there is.

        A large network has thousands, and looking takes longer than a step of a small one.
        """
        module, version = self.module, self.adapters.version
        if self._known is None or self._known[0] is not module or self._known[1] != version:
            self._known = module, version, _parts(module)
        return self._known[2]

    @property
    def companions(self) -> Sequence[nn.Module]:
        """Further networks of the model: what encodes its inputs and decodes its outputs."""
        return ()

    def fingerprint(self) -> str:
        """Hash a sample of the network's own weights, adapters left out; the same before and after adding them."""
        adapters = {id(p) for name in self.adapters.names for p in self.adapters.parameters(name)}
        named = self.module.named_parameters()
        own = [(name.replace(".base_layer", ""), p) for name, p in named if id(p) not in adapters]
        return fingerprint(own, max_values=1024)

    @property
    @abstractmethod
    def lora_targets(self) -> Sequence[str]:
        """Names of modules that adapters attach to by default in this family."""

    def with_module(
        self, module: nn.Module, device: torch.device | None = None, dtype: torch.dtype | None = None
    ) -> Self:
        """Return a policy over another network of the same architecture (a frozen copy), sharing all else.

        Its adapter bank is empty; adapters that ``module`` already carries stay as they are.

        Args:
            module: the other network.
            device, dtype: where its inputs and outputs are, and the inputs' type, if not its own.
        """
        other = copy.copy(self)
        BasePolicy.__init__(other, module, device, dtype)
        return other

    def train_weights(self) -> None:
        """Train all weights of the network instead of adapters: float32, with gradients.

        Raises:
            UserError: if there are adapters.
        """
        if self.adapters.names:
            raise UserError(f"the weights cannot train beside the adapters {list(self.adapters.names)}: choose one")
        self.module.float().requires_grad_(True)

    @abstractmethod
    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write what was trained: ``pytorch_lora_weights.safetensors`` (stock format), or a whole pipeline/model."""


class Policy(BasePolicy):
    """A diffusion model: encode, predict, decode.

    Args:
        module: the denoiser.
        process: its noise process.
    """

    def __init__(self, module: nn.Module, process: NoiseProcess) -> None:
        super().__init__(module)
        self.process = process
        self._empty_caption: list[Condition] = []  # none or one; policies over copies of the network share the list

    def null_condition(self, rows: int) -> Condition:
        """Return the encoded empty caption for a number of rows; encoded once and kept."""
        if not self._empty_caption:
            self._empty_caption.append(self.encode_prompts([""]))
        (null,) = self._empty_caption
        return Condition({name: value.expand(rows, *value.shape[1:]) for name, value in null.tensors.items()})

    def process_for(self, height: int, width: int) -> NoiseProcess:
        """Return the process for images of a size in pixels, on which samplers of some models depend."""
        return self.process

    @abstractmethod
    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """Evaluate the denoiser, one row each, no guidance.

        Args:
            latents: (rows, channels, ...) noisy latents.
            timesteps: (rows,) model-facing timesteps (integers for discrete processes, 1000 sigma for flow).
            condition: one row each.

        Returns:
            the prediction in the process's own parameterisation, shaped as ``latents``.
        """

    @abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Encode captions, one row each; the empty string is the unconditional branch.

        No gradient, and the encoders' own precision whatever mixed precision is on.
        """

    @abstractmethod
    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Encode pixels (rows, 3, height, width) in [-1, 1] to scaled latents; the posterior mean without generator.

        Raises:
            UserError: if latents come out non-finite (half-precision overflow of the VAE).
        """

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Decode scaled latents to pixels (rows, 3, height, width) in [0, 1], differentiably."""

    @abstractmethod
    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        """Shape of one image's latents for a size in pixels."""

    @abstractmethod
    def with_size(self, condition: Condition, sizes: Mapping[str, Any]) -> Condition:
        """Add size conditioning (original size, crop offset, target size) where the family has it; else unchanged."""

    @property
    def encoder_id(self) -> str:
        """Identity of the image and text encoders, for keys of cached latents and embeddings."""
        return type(self).__name__

    @property
    @abstractmethod
    def default_resolution(self) -> tuple[int, int]:
        """(height, width) in pixels that the model was made for, read from its own config."""

    @abstractmethod
    def offload_text_encoders(self) -> None:
        """Let the text encoders wait in main memory from now on; captions that are still to be encoded fetch them."""
