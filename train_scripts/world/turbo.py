"""Stage "turbo": tiny-sd-turbo, which draws in one step what tiny-sd draws in fifteen with guidance.

The student learns the teacher's map from initial noise and caption to the final picture, by regression on samples;
those of the preference data are among them. It predicts v, not epsilon: at the noisiest level the clean latent could
only be read from epsilon through a division by 0.07.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel

from diffalign.diffusion.random import randn_rows
from train_scripts.world import samples
from train_scripts.world.fitting import FitSettings, batches, fit
from train_scripts.world.sd import build_scheduler, export_pipeline
from train_scripts.world.text import build_tokenizer
from train_scripts.world.vae import encode
from train_scripts.world.workspace import Workspace

NAME = "tiny-sd-turbo"
FIT = FitSettings(steps=2000, learning_rate=1e-3, warmup=100, weight_decay=0.05, ema_decay=0.995, seed=7)
BATCH = 32
TIMESTEP = 999


def train(workspace: Workspace) -> None:
    """Train the student, from the teacher's weights."""
    unet = UNet2DConditionModel.from_pretrained(workspace.folder("sd") / "unet").to(memory_format=torch.channels_last)
    torch.nn.init.zeros_(unet.conv_out.weight)
    torch.nn.init.zeros_(unet.conv_out.bias)
    noise, clean, embeddings = teacher_map(workspace)
    level = build_scheduler().alphas_cumprod[TIMESTEP]
    timesteps = torch.full((BATCH,), TIMESTEP)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(noise), (BATCH,), generator=generator)
        start = noise[rows].contiguous(memory_format=torch.channels_last)
        velocity = unet(start, timesteps, embeddings[rows]).sample
        drawn = level.sqrt() * start - (1 - level).sqrt() * velocity
        return F.l1_loss(drawn, clean[rows])

    folder = workspace.folder("turbo")
    fit(NAME, [unet], loss, FIT.scaled(workspace), folder)
    unet.save_pretrained(folder / "unet")


@torch.no_grad()
def teacher_map(workspace: Workspace) -> tuple[Tensor, Tensor, Tensor]:
    """Return the teacher's samples: initial noise and final scaled latents (n, 4, 16, 16), and caption states."""
    vae = AutoencoderKL.from_pretrained(workspace.folder("vae"))
    drawn = [samples.load(workspace, plan) for plan in (samples.TRAIN, samples.TURBO)]
    clean = encode(vae, torch.cat([part.images for part in drawn])) * vae.config.scaling_factor
    seeds = torch.tensor([seed for part in drawn for seed in part.seeds])
    noise = randn_rows(seeds, tuple(clean.shape[1:]), "initial noise", clean.device)
    tokenizer = build_tokenizer()
    captions = [record.text for part in drawn for record in part.records]
    ids = tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
    encoder = CLIPTextModel.from_pretrained(workspace.folder("sd") / "text_encoder")
    states = [encoder(ids[rows]).last_hidden_state for rows in batches(len(ids), 256)]
    return noise, clean, torch.cat(states)


def export(workspace: Workspace) -> None:
    """Write the pipeline: one step, trailing spacing, no guidance."""
    unet = UNet2DConditionModel.from_pretrained(workspace.folder("turbo") / "unet")
    scheduler = build_scheduler(prediction_type="v_prediction", timestep_spacing="trailing", set_alpha_to_one=True)
    export_pipeline(unet, scheduler, workspace, NAME)
