"""Stage "sd": tiny-sd, a Stable Diffusion of 3.4M parameters (UNet, CLIP text encoder, epsilon prediction)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import Tensor
from transformers import CLIPTextModel

from train_scripts.world import latents
from train_scripts.world.fitting import FitSettings, fit
from train_scripts.world.text import build_tokenizer, text_config
from train_scripts.world.workspace import Workspace

FIT = FitSettings(steps=4000, learning_rate=2e-3, seed=3)
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


def build_scheduler(**changes: object) -> DDIMScheduler:
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
    """Train UNet and text encoder together; one caption in ten is dropped, for guidance."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    unet, encoder = build_unet(), CLIPTextModel(text_config(tokenizer, TEXT_WIDTH))
    data = latents.load(workspace)
    ids, empty = data.token_ids(tokenizer), latents.empty_caption(tokenizer)
    scheduler = build_scheduler()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        clean, tokens = data.latents[rows].float(), ids[rows]
        tokens[torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT] = empty
        timesteps = torch.randint(0, 1000, (BATCH,), generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        return F.mse_loss(unet(noisy, timesteps, encoder(tokens).last_hidden_state).sample, noise)

    folder = workspace.folder("sd")
    fit(NAME, [unet, encoder], loss, FIT.scaled(workspace), folder)
    unet.save_pretrained(folder / "unet")
    encoder.save_pretrained(folder / "text_encoder")


def export(workspace: Workspace) -> None:
    """Write the pipeline in float16."""
    folder = workspace.folder("sd")
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    export_pipeline(unet, build_scheduler(), workspace, NAME)


def export_pipeline(unet: UNet2DConditionModel, scheduler: DDIMScheduler, workspace: Workspace, name: str) -> None:
    """Write a Stable Diffusion pipeline of the world's parts and a UNet, in float16."""
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(workspace.folder("vae")),
        text_encoder=CLIPTextModel.from_pretrained(workspace.folder("sd") / "text_encoder"),
        tokenizer=build_tokenizer(),
        unet=unet,
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(workspace.out / name)
