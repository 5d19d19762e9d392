"""What all image policies over a diffusers pipeline share: codec, sizes, freeing, saving."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from diffalign.batch import Condition
from diffalign.diffusion.process import process_from_scheduler
from diffalign.errors import UserError
from diffalign.policies.adapters import DEFAULT_ADAPTER
from diffalign.policies.base import Policy
from diffalign.policies.codec import LatentCodec
from diffalign.policies.fingerprint import fingerprint
from diffalign.policies.saving import save_lora, save_pipeline


class PipelinePolicy(Policy):
    """A diffusers text-to-image pipeline, taken apart.

    Args:
        pipeline: the loaded pipeline; its parts are used, its ``__call__`` never.
        source: keyword arguments of ``from_pretrained`` that load it again, ``pretrained_model_name_or_path`` among
            them; recorded in what is saved.
    """

    pipelines: ClassVar[tuple[str, ...]]
    """Class names of the pipelines that this family covers."""
    denoiser: ClassVar[str]
    """Name of the pipeline's part that is trained, also the prefix of its weights in LoRA files."""
    load_options: ClassVar[Mapping[str, Any]] = {}
    """Further arguments of ``from_pretrained`` for this family."""

    def __init__(self, pipeline: Any, source: Mapping[str, Any] | None = None) -> None:
        self._pipeline = pipeline
        for part in self.parts:
            part.requires_grad_(False).eval()
        self._source = dict(source or {})
        self.codec = LatentCodec(pipeline.vae, pipeline.vae_scale_factor)
        super().__init__(getattr(pipeline, self.denoiser), process_from_scheduler(pipeline.scheduler))
        self._check_inputs()

    @property
    def config(self) -> Any:
        """The denoiser's own config."""
        return cast(Any, self.module).config

    @property
    def parts(self) -> list[nn.Module]:
        """All networks of the pipeline: denoiser, VAE, text encoders."""
        return [part for part in self._pipeline.components.values() if isinstance(part, nn.Module)]

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the denoiser's activations in backward instead of keeping them; only in train mode."""
        cast(Any, self.module).enable_gradient_checkpointing()

    @property
    def lora_targets(self) -> Sequence[str]:
        return ("to_q", "to_k", "to_v", "to_out.0")

    @cached_property
    def encoder_id(self) -> str:
        encoders = [(name, part) for name, part in self._pipeline.components.items() if isinstance(part, nn.Module)]
        named = [
            (f"{name}.{key}", value)
            for name, part in encoders
            if name != self.denoiser
            for key, value in part.named_parameters()
        ]
        return fingerprint(named, salt=repr(self.codec), max_values=1024)

    @property
    def default_resolution(self) -> tuple[int, int]:
        size = self.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.codec.downsampling, width * self.codec.downsampling

    @property
    def size_multiple(self) -> int:
        """Number that height and width in pixels must be multiples of."""
        return self.codec.downsampling

    def latent_shape(self, height: int, width: int) -> tuple[int, ...]:
        if height <= 0 or width <= 0 or height % self.size_multiple or width % self.size_multiple:
            raise UserError(
                f"images of {height}x{width} pixels do not fit: sides must be multiples of {self.size_multiple}"
            )
        return self.codec.channels, height // self.codec.downsampling, width // self.codec.downsampling

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.codec.encode(pixels, generator)

    def decode(self, latents: Tensor) -> Tensor:
        return self.codec.decode(latents)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        if self._freed:
            raise UserError("the text encoders were dropped after caching: encode captions before free_encoders()")
        with torch.autocast(self.device.type, enabled=False):  # one caption, one embedding, whoever asks first
            return self._encode_prompts(list(prompts))

    def with_size(self, condition: Condition, sizes: Mapping[str, Any]) -> Condition:
        return condition

    def free_encoders(self) -> None:
        if self._freed:
            return
        self.null_condition(1)  # kept: guidance needs it for ever
        _ = self.encoder_id  # kept: it names what the caches hold
        self.codec.free_encoder()
        encoders = [name for name in self._pipeline.components if name.startswith("text_encoder")]
        self._pipeline.register_modules(**dict.fromkeys(encoders))

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        recorded = {f"base_{key}": str(value) for key, value in self._source.items() if key in _RECORDED}
        recorded["base_model"] = str(self._source.get("pretrained_model_name_or_path", ""))
        if self.adapters.names:
            name = DEFAULT_ADAPTER if DEFAULT_ADAPTER in self.adapters.names else self.adapters.names[0]
            save_lora(folder, self.adapters, name, self.denoiser, {**recorded, **metadata})
            return
        pipeline = self._pipeline
        if self._freed:
            pipeline = type(pipeline).from_pretrained(**self._source, **{self.denoiser: self.module})
        save_pipeline(folder, pipeline, {**recorded, **metadata})

    @property
    def _freed(self) -> bool:
        return not self.codec.can_encode

    @abstractmethod
    def _encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode captions with the pipeline's own text encoders, which are there."""

    @abstractmethod
    def _check_inputs(self) -> None:
        """Refuse, with a UserError, denoisers of this class that want inputs this policy does not give."""


_RECORDED = ("revision", "variant")
