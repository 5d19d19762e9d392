"""Stage "sd3": tiny-sd3, a Stable Diffusion 3 of 3M parameters (joint transformer, rectified flow)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from transformers import CLIPTextModelWithProjection

from train_scripts.world import latents
from train_scripts.world.export import save_half
from train_scripts.world.fitting import FitSettings, fit
from train_scripts.world.text import build_tokenizer, text_config
from train_scripts.world.workspace import Workspace

FIT = FitSettings(steps=4000, learning_rate=1.5e-3, warmup=300, seed=4)
REFINE = FitSettings(steps=8000, learning_rate=1e-3, warmup=100, seed=9)
LAYOUT_SHARE, LAYOUT_FROM = 0.5, 0.6
"""Share of the second stage's examples that are this noisy at least: that is where colours and places are bound."""
BATCH = 32
CAPTION_DROPOUT = 0.1
TEXT_WIDTH, PROJECTION = 64, 48
T5_LENGTH = 256
"""Zero tokens that the stock pipeline puts in place of the absent third text encoder."""
FULL_LENGTH_EVERY = 16
"""Most steps train with few zero tokens, which cost time; every so many see the stock pipeline's number."""
NAME = "tiny-sd3"
ENCODERS = ("text_encoder", "text_encoder_2")
Encoders = tuple[CLIPTextModelWithProjection, CLIPTextModelWithProjection]


def build_transformer() -> SD3Transformer2DModel:
    """Make the transformer, untrained; with a sixth block all assets would pass 40 MB."""
    return SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=5,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=2 * TEXT_WIDTH,
        caption_projection_dim=128,
        pooled_projection_dim=2 * PROJECTION,
        pos_embed_max_size=16,
    )


def embed(encoders: Encoders, tokens: Tensor, zeros: int) -> tuple[Tensor, Tensor]:
    """Embed captions as the stock pipeline does: both encoders' last but one layers side by side, then zero tokens.

    Returns:
        (batch, length + zeros, 2 x width) and the pooled (batch, 2 x projection).
    """
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    padding = hidden.new_zeros(len(hidden), zeros, hidden.shape[-1])
    return torch.cat([hidden, padding], dim=1), torch.cat([output.text_embeds for output in outputs], dim=-1)


def train(workspace: Workspace) -> None:
    """Train transformer and text encoders together on the rectified flow, timesteps logit-normal."""
    torch.manual_seed(1)
    config = text_config(build_tokenizer(), TEXT_WIDTH, projection=PROJECTION)
    encoders = (CLIPTextModelWithProjection(config), CLIPTextModelWithProjection(config))
    _train(build_transformer(), encoders, FIT, workspace, "sd3-first", middle_levels)


def refine(workspace: Workspace) -> None:
    """Train on, mostly at high noise: shapes of a transformer come late, what belongs where later still."""
    folder = workspace.folder("sd3-first")
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    first, second = (CLIPTextModelWithProjection.from_pretrained(folder / part) for part in ENCODERS)
    _train(transformer, (first, second), REFINE, workspace, "sd3", noisy_levels)


def middle_levels(generator: torch.Generator) -> Tensor:
    """Shares of noise (batch,), logit-normal."""
    return torch.sigmoid(torch.randn(BATCH, generator=generator))


def noisy_levels(generator: torch.Generator) -> Tensor:
    """The same, but for a part that is uniform where there is much noise."""
    middle = middle_levels(generator)
    noisy = LAYOUT_FROM + (1 - LAYOUT_FROM) * torch.rand(BATCH, generator=generator)
    return torch.where(torch.rand(BATCH, generator=generator) < LAYOUT_SHARE, noisy, middle)


def _train(
    transformer: SD3Transformer2DModel,
    encoders: Encoders,
    settings: FitSettings,
    workspace: Workspace,
    name: str,
    draw_levels: Callable[[torch.Generator], Tensor],
) -> None:
    tokenizer = build_tokenizer()
    data = latents.load(workspace)
    ids, empty = data.token_ids(tokenizer), latents.empty_caption(tokenizer)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rows = torch.randint(len(ids), (BATCH,), generator=generator)
        clean, tokens = data.latents[rows].float(), ids[rows]
        tokens[torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT] = empty
        levels = draw_levels(generator)
        noise = torch.randn(clean.shape, generator=generator)
        share = levels.view(-1, 1, 1, 1)
        full = step % FULL_LENGTH_EVERY == 0
        zeros = T5_LENGTH if full else int(torch.randint(0, 6, (1,), generator=generator))
        hidden, pooled = embed(encoders, tokens, zeros)
        prediction = transformer(
            hidden_states=(1 - share) * clean + share * noise,
            timestep=levels * 1000,
            encoder_hidden_states=hidden,
            pooled_projections=pooled,
        ).sample
        return F.mse_loss(prediction, noise - clean)

    folder = workspace.folder(name)
    fit(name, [transformer, *encoders], loss, settings.scaled(workspace), folder)
    transformer.save_pretrained(folder / "transformer")
    for part, encoder in zip(ENCODERS, encoders, strict=True):
        encoder.save_pretrained(folder / part)


def export(workspace: Workspace) -> None:
    """Write the pipeline in float16."""
    folder = workspace.folder("sd3")
    absent: Any = None
    pipeline = StableDiffusion3Pipeline(
        transformer=SD3Transformer2DModel.from_pretrained(folder / "transformer"),
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0),
        vae=AutoencoderKL.from_pretrained(workspace.folder("vae")),
        text_encoder=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder"),
        tokenizer=build_tokenizer(),
        text_encoder_2=CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2"),
        tokenizer_2=build_tokenizer(),
        text_encoder_3=absent,
        tokenizer_3=absent,
    )
    save_half(pipeline, workspace.out / NAME)
