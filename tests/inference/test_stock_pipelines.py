"""Pipelines that no policy covers: FLUX with its packed latents, PixArt in the one step of its distilled model."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

import diffalign
from diffalign.inference.noise_generators import PipelineGenerator
from diffalign.inference.one_step import Sampling
from tests.factories import Ripples, clip_text_encoder, clip_tokenizer, t5_parts, vae

PROMPTS = ["a red cube", "two"]


def flux_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    t5 = t5_parts()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=16,
        axes_dims_rope=(4, 4, 8),
    )
    with tempfile.TemporaryDirectory() as folder:
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=vae(scaling_factor=0.5, shift_factor=0.1, use_quant_conv=False, use_post_quant_conv=False),
            text_encoder=clip_text_encoder(16, projection=False).eval(),
            tokenizer=clip_tokenizer(Path(folder)),
            text_encoder_2=t5["text_encoder_3"],
            tokenizer_2=t5["tokenizer_3"],
            transformer=transformer,
        )


def pixart_pipeline() -> Any:
    from diffusers import DDPMScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel

    t5 = t5_parts()
    transformer = PixArtTransformer2DModel(
        sample_size=8,
        num_layers=1,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=2,
        in_channels=4,
        out_channels=8,
        caption_channels=24,
        cross_attention_dim=16,
    )
    return PixArtAlphaPipeline(
        tokenizer=t5["tokenizer_3"],
        text_encoder=t5["text_encoder_3"],
        vae=vae(scaling_factor=0.5),
        transformer=transformer,
        scheduler=DDPMScheduler(clip_sample=False),
    )


CASES = {
    "flux": (flux_pipeline, Sampling(1, 0.0, resolution=(16, 16)), (16, 16)),
    "pixart": (pixart_pipeline, Sampling(1, 1.0, timesteps=(400,), resolution=(16, 16)), (4, 8, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_pipeline_makes_its_own_images_with_a_gradient(name: str) -> None:
    make, sampling, shape = CASES[name]
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        pipeline = make()
    pipeline.set_progress_bar_config(disable=True)
    generator = PipelineGenerator(pipeline, PROMPTS, sampling, [0, 0])
    assert generator.noise_shape == shape
    noise = generator.draw([1, 2])
    further: dict[str, Any] = {"timesteps": [400], "use_resolution_binning": False} if name == "pixart" else {}
    expected = pipeline(
        PROMPTS,
        latents=noise,
        num_inference_steps=1,
        guidance_scale=sampling.guidance_scale,
        height=16,
        width=16,
        output_type="pt",
        **further,
    ).images
    with torch.no_grad():
        assert_close(generator(noise, [0, 1]), expected)
    timesteps = list(sampling.timesteps) or None
    result = diffalign.optimize_noise(
        pipeline,
        "two",
        {"ripples": Ripples()},
        steps=5,
        seed=2,
        height=16,
        width=16,
        num_inference_steps=1,
        guidance_scale=sampling.guidance_scale,
        timesteps=timesteps,
    )
    assert result.iteration > 0
    assert result.total > result.history["total"][0]
    assert tuple(result.noise.shape) == shape
