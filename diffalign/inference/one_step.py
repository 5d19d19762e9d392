"""One-step text-to-image models by name: where their weights are, and how each is meant to be sampled.

The settings are those under which ReNO's authors used them (arXiv 2406.04312, https://github.com/ExplainableML/ReNO).
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

import torch

from diffalign.errors import UserError, unknown

_NO_OPTIONS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Sampling:
    """How a pipeline makes an image.

    Args:
        num_steps: denoising steps.
        guidance_scale: as the pipeline's own argument: 0 (SDXL-Turbo, FLUX) or 1 switch guidance off.
        timesteps: model-facing timesteps where the scheduler's own are not meant; empty for those.
        resolution: (height, width) in pixels; None for the model's own.
    """

    num_steps: int = 1
    guidance_scale: float = 0.0
    timesteps: tuple[int, ...] = ()
    resolution: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"the number of sampling steps is {self.num_steps}: expected 1 at least")
        if self.timesteps and len(self.timesteps) != self.num_steps:
            raise UserError(f"{len(self.timesteps)} timesteps were given for {self.num_steps} steps")


@dataclass(frozen=True)
class OneStepModel:
    """A distilled model.

    Args:
        repository: hub name of the pipeline.
        pipeline: class of diffusers.
        sampling: how it is sampled.
        scheduler: class of diffusers and its options, over the pipeline's own config; None keeps the pipeline's.
        denoiser: hub name of the weights that replace the pipeline's denoiser, and the file or folder there.
        vae: hub name of a VAE that stands half precision; None keeps the pipeline's.
        dtype: type it runs in.
        learning_rate: of its noise.
        pickled: some of the weights are no safetensors.
    """

    repository: str
    pipeline: str
    sampling: Sampling
    scheduler: tuple[str, Mapping[str, Any]] | None = None
    denoiser: tuple[str, str] | None = None
    vae: str | None = None
    dtype: torch.dtype = field(default=torch.float16)
    learning_rate: float = 5.0
    pickled: bool = False


ONE_STEP: dict[str, OneStepModel] = {
    "sd-turbo": OneStepModel(
        "stabilityai/sd-turbo", "StableDiffusionPipeline", Sampling(1, 1.0, resolution=(512, 512))
    ),
    "sdxl-turbo": OneStepModel(
        "stabilityai/sdxl-turbo",
        "StableDiffusionXLPipeline",
        Sampling(1, 0.0, resolution=(512, 512)),
        scheduler=("EulerAncestralDiscreteScheduler", {"timestep_spacing": "trailing"}),
        vae="madebyollin/sdxl-vae-fp16-fix",
    ),
    "pixart-dmd": OneStepModel(
        "PixArt-alpha/PixArt-XL-2-1024-MS",
        "PixArtAlphaPipeline",
        Sampling(1, 1.0, timesteps=(400,), resolution=(512, 512)),
        scheduler=("DDPMScheduler", _NO_OPTIONS),
        denoiser=("PixArt-alpha/PixArt-Alpha-DMD-XL-2-512x512", "transformer"),
        pickled=True,
    ),
    "hyper-sdxl": OneStepModel(
        "stabilityai/stable-diffusion-xl-base-1.0",
        "StableDiffusionXLPipeline",
        Sampling(1, 0.0, timesteps=(800,), resolution=(1024, 1024)),
        scheduler=("LCMScheduler", _NO_OPTIONS),
        denoiser=("ByteDance/Hyper-SD", "Hyper-SDXL-1step-Unet.safetensors"),
        learning_rate=10.0,
    ),
    "flux-schnell": OneStepModel(
        "black-forest-labs/FLUX.1-schnell",
        "FluxPipeline",
        Sampling(1, 0.0, resolution=(512, 512)),
        dtype=torch.bfloat16,
    ),
}
"""Name -> model."""
_LOADED: WeakKeyDictionary[Any, OneStepModel] = WeakKeyDictionary()
"""Pipelines that :func:`load_one_step` made."""


def get_one_step(name: str) -> OneStepModel:
    """Look a model up.

    Raises:
        UserError: if the name is unknown; the nearest known one is offered.
    """
    if name not in ONE_STEP:
        raise unknown("one-step model", name, ONE_STEP)
    return ONE_STEP[name]


def load_one_step(name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Any:
    """Load a model as a pipeline of diffusers, with the scheduler it was distilled for.

    Args:
        name: such as "sd-turbo".
        device: where it goes.
        dtype: type of the weights; by default the model's.

    Raises:
        UserError: for an unknown name, or weights that are neither cached nor can be fetched.
    """
    import diffusers

    model = get_one_step(name)
    dtype = dtype or model.dtype
    options: dict[str, Any] = {"torch_dtype": dtype, "use_safetensors": None if model.pickled else True}
    try:
        if model.vae is not None:
            options["vae"] = diffusers.AutoencoderKL.from_pretrained(model.vae, torch_dtype=dtype)
        if model.denoiser is not None:
            part, network = _denoiser(model, dtype)
            options[part] = network
        pipeline = getattr(diffusers, model.pipeline).from_pretrained(model.repository, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {name} ({model.repository}): {error}") from error
    if model.scheduler is not None:
        scheduler, changes = model.scheduler
        pipeline.scheduler = getattr(diffusers, scheduler).from_config(pipeline.scheduler.config, **changes)
    pipeline.set_progress_bar_config(disable=True)
    _LOADED[pipeline] = model
    return pipeline.to(device)


def known_model(pipeline: Any) -> OneStepModel | None:
    """Return what is known of a pipeline, by who loaded it or the name it was loaded from; None where nothing is.

    Loaded elsewhere, models whose denoiser was exchanged cannot be told from their base, and are not guessed.
    """
    if isinstance(pipeline, Hashable) and pipeline in _LOADED:
        return _LOADED[pipeline]
    config = getattr(pipeline, "config", {})
    source = str(config.get("_name_or_path", "")) if hasattr(config, "get") else ""
    named = (model for model in ONE_STEP.values() if model.denoiser is None and model.repository == source)
    return next(named, None)


def _denoiser(model: OneStepModel, dtype: torch.dtype) -> tuple[str, Any]:
    """Load the denoiser that replaces the pipeline's; returns its part's name too."""
    import diffusers
    from huggingface_hub import hf_hub_download
    from safetensors.torch import load_file

    assert model.denoiser is not None
    repository, where = model.denoiser
    if not where.endswith(".safetensors"):
        network = diffusers.AutoModel.from_pretrained(repository, subfolder=where, torch_dtype=dtype)
        return where, network
    config = diffusers.UNet2DConditionModel.load_config(model.repository, subfolder="unet")
    unet: Any = diffusers.UNet2DConditionModel.from_config(config)
    unet.load_state_dict(load_file(hf_hub_download(repository, where)))
    return "unet", unet.to(dtype)
