"""What all image policies over a diffusers pipeline share: codec, sizes, offloading, saving."""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from diffalign.batch import Condition
from diffalign.diffusion.base import NoiseProcess
from diffalign.diffusion.flow import SigmaSpacing
from diffalign.diffusion.process import process_from_scheduler
from diffalign.errors import UserError
from diffalign.policies.adapters import DEFAULT_ADAPTER
from diffalign.policies.base import Policy
from diffalign.policies.codec import LatentCodec
from diffalign.policies.fingerprint import fingerprint
from diffalign.policies.saving import save_lora, save_pipeline

LEFT_OUT = "base_without"
"""Under this key an adapter's file names the text encoders that it was trained without."""


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
    sigma_spacing: ClassVar[SigmaSpacing | None] = None
    """How a flow model's pipeline spaces its levels with a flow-matching scheduler, which does not say."""

    def __init__(self, pipeline: Any, source: Mapping[str, Any] | None = None) -> None:
        self._pipeline = pipeline
        for part in self.parts:
            part.requires_grad_(False).eval()
        self._source = dict(source or {})
        self.codec = LatentCodec(pipeline.vae, pipeline.vae_scale_factor)
        scheduler = pipeline.scheduler
        spacing = None if scheduler.config.get("use_flow_sigmas") else self.sigma_spacing
        process = process_from_scheduler(scheduler, sigma_spacing=spacing)
        super().__init__(getattr(pipeline, self.denoiser), process)
        self._check_inputs()
        self.process = self.process_for(*self.default_resolution)

    @property
    def config(self) -> Any:
        """The denoiser's own config."""
        return cast(Any, self.module).config

    @property
    def parts(self) -> list[nn.Module]:
        """All networks of the pipeline: denoiser, VAE, text encoders."""
        return [part for part in self._pipeline.components.values() if isinstance(part, nn.Module)]

    @property
    def companions(self) -> Sequence[nn.Module]:
        denoiser = getattr(self._pipeline, self.denoiser)
        return [part for part in self.parts if part is not denoiser]

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

    @property
    def usual_sampling(self) -> tuple[int, float]:
        """Steps and guidance scale of the stock pipeline, where it is not told otherwise."""
        defaults = inspect.signature(type(self._pipeline).__call__).parameters
        return defaults["num_inference_steps"].default, defaults["guidance_scale"].default

    def process_for(self, height: int, width: int) -> NoiseProcess:
        return self.process.at_resolution((height // self.size_multiple) * (width // self.size_multiple))

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
        # without mixed precision: a caption has one embedding, whoever asks for it first
        with self._text_encoders_here(), torch.autocast(self.device.type, enabled=False):
            return self._encode_prompts(list(prompts))

    def with_size(self, condition: Condition, sizes: Mapping[str, Any]) -> Condition:
        return condition

    def offload_text_encoders(self) -> None:
        self.null_condition(1)  # guidance asks for it in every step
        for encoder in self._text_encoders:
            encoder.to("cpu")

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        recorded = {f"base_{key}": str(value) for key, value in self._source.items() if key in _RECORDED}
        left_out = [name for name, part in self._source.items() if name.startswith("text_encoder") and part is None]
        recorded |= {LEFT_OUT: ", ".join(left_out)} if left_out else {}
        recorded["base_model"] = str(self._source.get("pretrained_model_name_or_path", ""))
        if self.adapters.names:
            name = DEFAULT_ADAPTER if DEFAULT_ADAPTER in self.adapters.names else self.adapters.names[0]
            save_lora(folder, self.adapters, name, self.denoiser, {**recorded, **metadata})
            return
        pipeline = self._pipeline
        if any(_dtype(part) != self.dtype for part in self.companions):  # half precision is not for the export
            whole = {**self._source, "torch_dtype": self.dtype, self.denoiser: self.module}
            pipeline = type(pipeline).from_pretrained(**whole)
        save_pipeline(folder, pipeline, {**recorded, **metadata})

    @property
    def _text_encoders(self) -> list[nn.Module]:
        named = self._pipeline.components.items()
        return [part for name, part in named if name.startswith("text_encoder") and part is not None]

    @contextmanager
    def _text_encoders_here(self) -> Iterator[None]:
        """Hold the text encoders where inputs are; those that wait elsewhere go back there."""
        waiting = [(part, place) for part in self._text_encoders if (place := _place(part)) != self.device]
        for encoder, _ in waiting:
            encoder.to(self.device)
        try:
            yield
        finally:
            for encoder, place in waiting:
                encoder.to(place)

    @abstractmethod
    def _encode_prompts(self, prompts: list[str]) -> Condition:
        """Encode captions with the pipeline's own text encoders, which are there."""

    @abstractmethod
    def _check_inputs(self) -> None:
        """Refuse, with a UserError, denoisers of this class that want inputs this policy does not give."""


def _place(module: nn.Module) -> torch.device:
    return next(module.parameters()).device


def _dtype(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


_RECORDED = ("revision", "variant")
