"""Stage "sd3": tiny-sd3, a Stable Diffusion 3 of 3M parameters (joint transformer, rectified flow)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from diffalign.batch import Condition
from diffalign.diffusion.guidance import guided
from diffalign.policies.attention import dispatch_attention
from diffalign.policies.sd3 import T5_LENGTH
from train_scripts.world import latents
from train_scripts.world.export import save_half
from train_scripts.world.fitting import FitSettings, fit
from train_scripts.world.sd import build_scheduler
from train_scripts.world.text import build_tokenizer, text_config
from train_scripts.world.workspace import Workspace

FIT = FitSettings(steps=9000, learning_rate=1.5e-3, warmup=300, seed=4)
REFINE = FitSettings(steps=8000, learning_rate=1.5e-3, warmup=200, ema_decay=0.998, seed=10)
LAYOUT_SHARE, LAYOUT_FROM = 0.5, 0.6
"""Share of the second stage's examples that are this noisy at least: that is where colours and places are bound."""
TEACHER_GUIDANCE = 4.0
TEACHER_MAX_NOISE = 0.93
"""Share of noise at tiny-sd's last timestep, a little less: noisier inputs are shown to the teacher at this share."""
BATCH = 32
CAPTION_DROPOUT = 0.1
MIN_NOISE = 0.02
"""The teacher's velocity is a difference divided by the share of noise."""
TEXT_WIDTH, PROJECTION = 64, 48
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


def embed(encoders: Encoders, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embed captions as the stock pipeline does: both encoders' last but one layers side by side, then zero tokens.

    Returns:
        (batch, length + 1, 2 x width); how many tokens each stands for (batch, length + 1), as the last one stands for
        all zeros of the absent third encoder; and the pooled (batch, 2 x projection).
    """
    outputs = [encoder(tokens, output_hidden_states=True) for encoder in encoders]
    hidden = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
    hidden = F.pad(hidden, (0, 0, 0, 1))
    counts = torch.ones(hidden.shape[:2])
    counts[:, -1] = T5_LENGTH
    return hidden, counts, torch.cat([output.text_embeds for output in outputs], dim=-1)


class Examples(NamedTuple):
    """A batch on its way along the flow.

    Args:
        clean, noise: (batch, 4, 16, 16).
        levels: (batch,), shares of noise.
        tokens: (batch, length), of the captions; those of the empty one where it was dropped.
    """

    clean: Tensor
    noise: Tensor
    levels: Tensor
    tokens: Tensor

    def noisy(self, levels: Tensor) -> Tensor:
        """The latents at other shares of noise (batch,)."""
        share = levels.view(-1, 1, 1, 1)
        return (1 - share) * self.clean + share * self.noise


Target = Callable[[Examples], Tensor]
"""What the transformer shall predict, (batch, 4, 16, 16)."""


def train(workspace: Workspace) -> None:
    """Train transformer and text encoders together on the rectified flow, timesteps logit-normal."""
    torch.manual_seed(1)
    config = text_config(build_tokenizer(), TEXT_WIDTH, projection=PROJECTION)
    encoders = (CLIPTextModelWithProjection(config), CLIPTextModelWithProjection(config))
    _train(
        build_transformer(), encoders, FIT, workspace, "sd3-first", middle_levels, lambda rows: rows.noise - rows.clean
    )


def refine(workspace: Workspace) -> None:
    """Train on, mostly at high noise, towards what tiny-sd predicts with guidance.

    A transformer without a convolution's bias learns shapes late. The teacher's expectation varies less than pictures
    do, and with guidance in it, sampling does not multiply the student's errors.
    """
    folder = workspace.folder("sd3-first")
    transformer = SD3Transformer2DModel.from_pretrained(folder / "transformer")
    first, second = (CLIPTextModelWithProjection.from_pretrained(folder / part) for part in ENCODERS)
    _train(transformer, (first, second), REFINE, workspace, "sd3", noisy_levels, Teacher(workspace))


def middle_levels(generator: torch.Generator) -> Tensor:
    """Shares of noise (batch,), logit-normal."""
    return torch.sigmoid(torch.randn(BATCH, generator=generator))


def noisy_levels(generator: torch.Generator) -> Tensor:
    """The same, but for a part that is uniform where there is much noise."""
    middle = middle_levels(generator)
    noisy = LAYOUT_FROM + (1 - LAYOUT_FROM) * torch.rand(BATCH, generator=generator)
    return torch.where(torch.rand(BATCH, generator=generator) < LAYOUT_SHARE, noisy, middle)


class Teacher:
    """tiny-sd's guided prediction as a velocity of the flow; unguided where the caption was dropped."""

    def __init__(self, workspace: Workspace) -> None:
        folder = workspace.folder("sd")
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet").to(memory_format=torch.channels_last)
        self.encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
        self.empty = latents.empty_caption(build_tokenizer())
        cumulative = build_scheduler().alphas_cumprod
        self.log_snr = (cumulative / (1 - cumulative)).log()

    @torch.no_grad()
    def __call__(self, rows: Examples) -> Tensor:
        """Return (x - E[clean | x, caption]) / share of noise."""
        levels = rows.levels.clamp(max=TEACHER_MAX_NOISE)
        share = levels.view(-1, 1, 1, 1)
        noisy = rows.noisy(levels)
        scaled = noisy / (share.square() + (1 - share).square()).sqrt()
        states, blank = (self.encoder(ids).last_hidden_state for ids in (rows.tokens, self.empty[None]))
        captions, empty = (Condition({"text": text}) for text in (states, blank.expand_as(states)))
        predict = guided(self._denoise, captions, empty, TEACHER_GUIDANCE)
        noise = predict(scaled, self.timesteps(levels)).float()
        clean = (noisy - share * noise) / (1 - share)
        return (rows.noisy(rows.levels) - clean) / rows.levels.view(-1, 1, 1, 1)

    def _denoise(self, scaled: Tensor, timesteps: Tensor, text: Condition) -> Tensor:
        return self.unet(scaled.contiguous(memory_format=torch.channels_last), timesteps, text.tensors["text"]).sample

    def timesteps(self, levels: Tensor) -> Tensor:
        """Timesteps (batch,), fractions included, at which tiny-sd knows these shares of noise by their SNR."""
        wanted = 2 * ((1 - levels) / levels).log()
        after = torch.searchsorted(-self.log_snr, -wanted).clamp(1, len(self.log_snr) - 1)
        before, behind = self.log_snr[after - 1], self.log_snr[after]
        return after - 1 + ((before - wanted) / (before - behind)).clamp(0, 1)


def _train(
    transformer: SD3Transformer2DModel,
    encoders: Encoders,
    settings: FitSettings,
    workspace: Workspace,
    name: str,
    draw_levels: Callable[[torch.Generator], Tensor],
    target: Target,
) -> None:
    tokenizer = build_tokenizer()
    data = latents.load(workspace)
    ids, empty = data.token_ids(tokenizer), latents.empty_caption(tokenizer)
    dispatch_attention(transformer, "native")

    def loss(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(ids), (BATCH,), generator=generator)
        clean, tokens = data.latents[chosen].float(), ids[chosen]
        tokens[torch.rand(BATCH, generator=generator) < CAPTION_DROPOUT] = empty
        levels = draw_levels(generator).clamp(min=MIN_NOISE)
        rows = Examples(clean, torch.randn(clean.shape, generator=generator), levels, tokens)
        # quicker where the CPU has bfloat16, if attention is written out: the fused one is slow backward
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            hidden, counts, pooled = embed(encoders, tokens)
            prediction = transformer(
                hidden_states=rows.noisy(levels),
                timestep=levels * 1000,
                encoder_hidden_states=hidden,
                pooled_projections=pooled,
                joint_attention_kwargs={"token_counts": counts},
            ).sample
            wanted = target(rows)
        return F.mse_loss(prediction.float(), wanted)

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
