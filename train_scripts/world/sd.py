"""Stage "sd": tiny-sd, a Stable Diffusion of 3.4M parameters (UNet, CLIP text encoder, epsilon prediction)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextModel

from train_scripts.world import latents
from train_scripts.world.export import save_half
from train_scripts.world.fitting import FitSettings, fit
from train_scripts.world.text import build_tokenizer, text_config
from train_scripts.world.workspace import Workspace

FIT = FitSettings(steps=4000, learning_rate=2e-3, seed=3)
REFINE = FitSettings(steps=6000, learning_rate=1.5e-3, warmup=100, floor=0.01, ema_decay=0.998, seed=9)
LAYOUT_SHARE, LAYOUT_LEVELS = 0.7, (250, 1000)
"""Share of the second training's rows whose timestep lies where colours and places are decided."""
MAX_WEIGHT = 10.0
"""Bound of the second training's error weights."""
BATCH = 32
CAPTION_DROPOUT = 0.1
TEXT_WIDTH = 96
NAME = "tiny-sd"


def build_unet() -> UNet2DConditionModel:
    """Make the UNet, untrained."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(48, 80, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,
        norm_num_groups=16,
    ).to(memory_format=torch.channels_last)


def build_scheduler(**changes: object) -> Any:
    """Make the scheduler with the constants of Stable Diffusion 1.5."""
    settings = {
        "num_train_timesteps": 1000,
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    }
    return DDIMScheduler(**{**settings, **changes})


def train(workspace: Workspace) -> None:
    """Train UNet and text encoder together, at all timesteps alike."""
    torch.manual_seed(0)
    unet, encoder = build_unet(), CLIPTextModel(text_config(build_tokenizer(), TEXT_WIDTH))
    _train(
        unet,
        encoder,
        FIT,
        workspace,
        "sd-first",
        lambda generator: torch.randint(0, 1000, (BATCH,), generator=generator),
        torch.ones(1000),
    )


def refine(workspace: Workspace) -> None:
    """Train on, mostly at high noise: shapes are learned first, colours, binding and places last."""

    def timesteps(generator: torch.Generator) -> Tensor:
        layout = torch.randint(*LAYOUT_LEVELS, (BATCH,), generator=generator)
        anywhere = torch.randint(0, 1000, (BATCH,), generator=generator)
        return torch.where(torch.rand(BATCH, generator=generator) < LAYOUT_SHARE, layout, anywhere)

    folder = workspace.folder("sd-first")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet").to(memory_format=torch.channels_last)
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
    _train(unet, encoder, REFINE, workspace, "sd", timesteps, velocity_weights())


def velocity_weights() -> Tensor:
    """Weights (1000,) that make the error of epsilon that of the velocity, 1 / alphas_cumprod = 1 + 1 / SNR, bounded.

    Epsilon's own error hardly notices a wrong colour at high noise, where colours are decided.
    """
    return (1 / build_scheduler().alphas_cumprod).clamp(max=MAX_WEIGHT)


def _train(
    unet: UNet2DConditionModel,
    encoder: CLIPTextModel,
    settings: FitSettings,
    workspace: Workspace,
    stage: str,
    draw_timesteps: Callable[[torch.Generator], Tensor],
    weights: Tensor,
) -> None:
    """Minimise the error of the predicted noise, weighted by timestep (1000,); one caption in ten is dropped."""
    tokenizer = build_tokenizer()
    data = latents.load(workspace)
    ids, empty = data.token_ids(tokenizer), latents.empty_caption(tokenizer)
    scheduler = build_scheduler()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        clean, tokens = data.latents[rows].float(), ids[rows]
        tokens[torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT] = empty
        timesteps = draw_timesteps(generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        error = unet(noisy, timesteps, encoder(tokens).last_hidden_state).sample - noise
        return (weights[timesteps] * error.square().mean((1, 2, 3))).mean()

    folder = workspace.folder(stage)
    fit(NAME, [unet, encoder], loss, settings.scaled(workspace), folder)
    unet.save_pretrained(folder / "unet")
    encoder.save_pretrained(folder / "text_encoder")


def export(workspace: Workspace, stage: str = "sd") -> None:
    """Write the pipeline of a training in float16."""
    unet = UNet2DConditionModel.from_pretrained(workspace.folder(stage) / "unet")
    export_pipeline(unet, build_scheduler(), workspace, NAME, stage)


def export_pipeline(
    unet: UNet2DConditionModel, scheduler: Any, workspace: Workspace, name: str, stage: str = "sd"
) -> None:
    """Write a Stable Diffusion pipeline in float16: a UNet with the VAE and a training's text encoder."""
    absent: Any = None
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(workspace.folder("vae")),
        text_encoder=CLIPTextModel.from_pretrained(workspace.folder(stage) / "text_encoder"),
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=absent,
        feature_extractor=absent,
        requires_safety_checker=False,
    )
    save_half(pipeline, workspace.out / name)
