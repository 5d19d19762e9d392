"""Stage "vae": the autoencoder, 64 x 64 pixels to 16 x 16 latents of four channels.

First both halves are trained together; then the encoder is frozen and the decoder alone learns to draw clean edges from
slightly disturbed latents, as denoisers give them.
"""

from __future__ import annotations

import random
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from train_scripts.world.fitting import FitSettings, batches, fit
from train_scripts.world.pictures import rendered
from train_scripts.world.workspace import Workspace

JOINT = FitSettings(steps=900, learning_rate=2e-3, weight_decay=0.0, ema_decay=0.99, seed=1)
DECODER = FitSettings(steps=1500, learning_rate=1e-3, weight_decay=0.0, ema_decay=0.99, seed=2)
BATCH = 16
KL_WEIGHT = 1e-4
DECODER_POOL = 6000
DECODER_NOISE = 0.1
"""Standard deviation of the disturbance, in units of the scaled latents."""


def build_vae() -> AutoencoderKL:
    """Make the autoencoder, untrained: 0.6M parameters, no attention."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        latent_channels=4,
        block_out_channels=(16, 32, 64),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        mid_block_add_attention=False,
    ).to(memory_format=torch.channels_last)


def train(workspace: Workspace) -> None:
    """Train the autoencoder and set its scaling factor so that latents have unit deviation."""
    torch.manual_seed(0)
    vae = build_vae()

    def loss(step: int, generator: torch.Generator) -> Tensor:
        _, images = rendered(BATCH, random.Random(f"vae/{step}"))
        posterior = vae.encode(images).latent_dist
        error = vae.decode(posterior.sample(generator=generator)).sample - images
        kl = posterior.kl().mean() / (4 * 16 * 16)
        return error.square().mean() + 0.1 * error.abs().mean() + KL_WEIGHT * kl

    fit("vae", [vae], loss, JOINT.scaled(workspace), workspace.folder("vae-joint"))
    _, images = rendered(256, random.Random("vae/scale"))
    latents = encode(vae, images)
    vae.register_to_config(scaling_factor=float(1 / latents.std()), shift_factor=0.0)
    vae.save_pretrained(workspace.folder("vae-joint"))
    refine_decoder(vae, workspace)
    vae.save_pretrained(workspace.folder("vae"))


def refine_decoder(vae: Any, workspace: Workspace) -> None:
    """Train the decoder alone; latents, and thereby everything trained on them, stay as they are."""
    vae.encoder.requires_grad_(False)
    vae.quant_conv.requires_grad_(False)
    _, images = rendered(workspace.amount(DECODER_POOL, BATCH), random.Random("vae/decoder"))
    latents = encode(vae, images)
    disturbance = DECODER_NOISE / vae.config.scaling_factor

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(images), (BATCH,), generator=generator)
        level = disturbance * torch.rand(BATCH, 1, 1, 1, generator=generator)
        noisy = latents[rows] + level * torch.randn(latents[rows].shape, generator=generator)
        error = vae.decode(noisy.contiguous(memory_format=torch.channels_last)).sample - images[rows]
        return error.square().mean() + 0.3 * error.abs().mean()

    fit("decoder", [vae.decoder, vae.post_quant_conv], loss, DECODER.scaled(workspace), workspace.folder("vae"))
    vae.requires_grad_(True)


@torch.no_grad()
def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the unscaled posterior means of images (n, 3, 64, 64) in [-1, 1], (n, 4, 16, 16)."""
    return torch.cat([vae.encode(images[rows]).latent_dist.mean for rows in batches(len(images), 64)])


@torch.no_grad()
def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Return the images (n, 3, 64, 64) of unscaled latents (n, 4, 16, 16)."""
    return torch.cat([vae.decode(latents[rows]).sample for rows in batches(len(latents), 64)])
