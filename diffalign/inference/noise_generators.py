"""Differentiable generators: from initial noise and captions to images, over policies and over stock pipelines."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.diffusion.differentiable import sample_with_gradient
from diffalign.diffusion.guidance import guided
from diffalign.diffusion.random import randn_rows
from diffalign.errors import UserError
from diffalign.inference.one_step import Sampling
from diffalign.policies.components import PipelinePolicy

_PACKED = {"FluxPipeline": 4}
"""Pipelines whose denoiser sees several latent channels folded into one token -> how many."""


class NoiseGenerator(ABC):
    """A frozen text-to-image model as a function of its noise.

    Args:
        prompts: captions, one a search.
        sampling: how images are made.
    """

    def __init__(self, prompts: Sequence[str], sampling: Sampling) -> None:
        self.prompts, self.sampling = list(prompts), sampling

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where noise must be."""

    @property
    @abstractmethod
    def noise_shape(self) -> tuple[int, ...]:
        """Shape of one image's noise."""

    @property
    @abstractmethod
    def modules(self) -> Sequence[nn.Module]:
        """All networks."""

    @abstractmethod
    def __call__(self, noise: Tensor, rows: Sequence[int]) -> Tensor:
        """Make images (rows, 3, height, width) in [0, 1], float32, with a graph where one is recorded.

        Args:
            noise: (rows, channels, ...) standard normal.
            rows: index of each row's prompt.
        """

    def draw(self, seeds: Sequence[int]) -> Tensor:
        """Return standard normal noise (rows, channels, ...), one row a seed."""
        return randn_rows(torch.tensor(seeds), self.noise_shape, "initial noise", self.device)

    @contextmanager
    def frozen(self, checkpointing: bool, vae_slicing: bool) -> Iterator[None]:
        """Hold all weights constant; everything is afterwards as it was before.

        Args:
            checkpointing: compute activations again in backward, where the networks can.
            vae_slicing: decode images one at a time.
        """
        with ExitStack() as stack:
            for module in self.modules:
                stack.enter_context(_constant(module))
                if checkpointing:
                    stack.enter_context(_checkpointed(module))
                if vae_slicing and hasattr(module, "enable_slicing"):
                    stack.enter_context(_sliced(module))
            yield


class PolicyGenerator(NoiseGenerator):
    """A policy of this package, with whatever adapter is active.

    Args:
        policy: the model.
        prompts, sampling: see :class:`NoiseGenerator`.
    """

    def __init__(self, policy: PipelinePolicy, prompts: Sequence[str], sampling: Sampling) -> None:
        super().__init__(prompts, sampling)
        self.policy = policy
        self._size = sampling.resolution or policy.default_resolution
        size = torch.tensor([self._size] * len(self.prompts))
        sizes = {"original_size": size, "target_size": size}
        self._condition = policy.with_size(policy.encode_prompts(self.prompts), sizes)
        process = policy.process_for(*self._size)
        self._grid = (
            process.grid_through(sampling.timesteps)
            if sampling.timesteps
            else process.sampling_grid(sampling.num_steps)
        )

    @property
    def device(self) -> torch.device:
        return self.policy.device

    @property
    def noise_shape(self) -> tuple[int, ...]:
        return self.policy.latent_shape(*self._size)

    @property
    def modules(self) -> Sequence[nn.Module]:
        return self.policy.parts

    def __call__(self, noise: Tensor, rows: Sequence[int]) -> Tensor:
        scale = self.sampling.guidance_scale or 1.0  # pipelines switch guidance off by 0 too
        condition = self._condition.select(torch.tensor(rows, device=self.device))
        null = self.policy.null_condition(len(rows)) if scale != 1.0 else None
        latents = sample_with_gradient(
            guided(self.policy.predict, condition, null, scale),
            self.policy.process,
            noise * self._grid.noise_scale,
            self._grid,
            [True] * len(self._grid),
            checkpointing=len(self._grid) > 1,
        )
        return self.policy.decode(latents)


class PipelineGenerator(NoiseGenerator):
    """Any text-to-image pipeline of diffusers that takes ``latents``, with its own scheduler and sampling loop.

    Args:
        pipeline: the loaded pipeline.
        prompts, sampling: see :class:`NoiseGenerator`.
        seeds: one a prompt, for schedulers that add noise of their own: the same in every iteration.

    Raises:
        UserError: if the pipeline lacks an argument that is needed.
    """

    def __init__(self, pipeline: Any, prompts: Sequence[str], sampling: Sampling, seeds: Sequence[int]) -> None:
        super().__init__(prompts, sampling)
        self.pipeline, self._seeds = pipeline, list(seeds)
        # the stock call forbids gradients by a decorator; what it wraps does not
        self._call = inspect.unwrap(type(pipeline).__call__)
        known = inspect.signature(self._call).parameters
        wanted = ["prompt", "latents", "output_type", *(["timesteps"] if sampling.timesteps else [])]
        if missing := [name for name in wanted if name not in known]:
            raise UserError(
                f"{type(pipeline).__name__} takes no {', '.join(missing)}: its noise cannot be optimised this way"
            )
        size = dict(zip(("height", "width"), sampling.resolution, strict=True)) if sampling.resolution else {}
        offered = {
            "num_inference_steps": sampling.num_steps,
            "guidance_scale": sampling.guidance_scale,
            "output_type": "pt",
            "return_dict": False,
            "use_resolution_binning": False,  # the noise has the size already
            **({"timesteps": list(sampling.timesteps)} if sampling.timesteps else {}),
            **size,
        }
        self._arguments = {name: value for name, value in offered.items() if name in known}

    @property
    def device(self) -> torch.device:
        return self.pipeline._execution_device

    @property
    def noise_shape(self) -> tuple[int, ...]:
        pipeline = self.pipeline
        denoiser = self._denoiser
        channels = denoiser.config.in_channels // _PACKED.get(type(pipeline).__name__, 1)
        side = denoiser.config.get("sample_size") or getattr(pipeline, "default_sample_size", 64)
        own = tuple(s * pipeline.vae_scale_factor for s in ((side, side) if isinstance(side, int) else side))
        height, width = self.sampling.resolution or own
        generator = torch.Generator().manual_seed(0)
        drawn = pipeline.prepare_latents(1, channels, height, width, torch.float32, torch.device("cpu"), generator)
        return tuple((drawn[0] if isinstance(drawn, tuple) else drawn).shape[1:])

    @property
    def modules(self) -> Sequence[nn.Module]:
        return [part for part in self.pipeline.components.values() if isinstance(part, nn.Module)]

    def __call__(self, noise: Tensor, rows: Sequence[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(self._seeds[row]) for row in rows]
        with _quiet(self.pipeline):
            images = self._call(
                self.pipeline,
                prompt=[self.prompts[row] for row in rows],
                latents=noise.to(self._denoiser.dtype),
                generator=generators,
                **self._arguments,
            )[0]
        return images.float()

    @property
    def _denoiser(self) -> Any:
        return getattr(self.pipeline, "unet", None) or self.pipeline.transformer


@contextmanager
def _quiet(pipeline: Any) -> Iterator[None]:
    """Without progress bar, and without what looks at finished pictures: checkers and watermarks cut the gradient."""
    bar = getattr(pipeline, "_progress_bar_config", {})
    watching = {name: getattr(pipeline, name) for name in ("safety_checker", "watermark") if hasattr(pipeline, name)}
    pipeline.set_progress_bar_config(disable=True)
    try:
        for name in watching:
            setattr(pipeline, name, None)
        yield
    finally:
        pipeline.set_progress_bar_config(**bar)
        for name, part in watching.items():
            setattr(pipeline, name, part)


@contextmanager
def _constant(module: nn.Module) -> Iterator[None]:
    trained = [p for p in module.parameters() if p.requires_grad]
    was_training = module.training
    module.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
        module.train(was_training)


@contextmanager
def _checkpointed(module: Any) -> Iterator[None]:
    if not getattr(module, "_supports_gradient_checkpointing", False) or module.is_gradient_checkpointing:
        yield
        return
    module.enable_gradient_checkpointing()
    try:
        yield
    finally:
        module.disable_gradient_checkpointing()


@contextmanager
def _sliced(module: Any) -> Iterator[None]:
    was = bool(getattr(module, "use_slicing", False))
    module.enable_slicing()
    try:
        yield
    finally:
        if not was:
            module.disable_slicing()
