"""Stable Diffusion 1.x and 2.x, and Stable Diffusion XL: policies over ``UNet2DConditionModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from diffalign.batch import Condition
from diffalign.errors import UserError
from diffalign.policies.components import PipelinePolicy


class UNetPolicy(PipelinePolicy):
    """Stable Diffusion 1.x and 2.x: one text encoder, condition ``prompt_embeds`` (rows, tokens, width)."""

    pipelines = ("StableDiffusionPipeline",)
    denoiser = "unet"
    # the checker looks at finished pictures; training never calls it
    load_options: ClassVar[Mapping[str, Any]] = {"safety_checker": None, "requires_safety_checker": False}

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        text = condition.tensors["prompt_embeds"].to(self.dtype)
        added = self._added_conditions(latents, condition)
        output = self.module(
            latents.to(self.dtype),
            timesteps,
            encoder_hidden_states=text,
            added_cond_kwargs=added,
            return_dict=False,
        )[0]
        return self.adapters.guard(output)

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        embeds, _ = self._pipeline.encode_prompt(prompts, self.device, 1, do_classifier_free_guidance=False)
        return Condition({"prompt_embeds": embeds})

    def _added_conditions(self, latents: Tensor, condition: Condition) -> dict[str, Tensor] | None:
        return None

    def _check_inputs(self) -> None:
        config = self.config
        if config.in_channels != self.codec.channels:
            raise UserError(
                f"the UNet takes {config.in_channels} channels but its VAE gives {self.codec.channels}: "
                "inpainting and other image-conditioned models are not supported"
            )
        if config.time_cond_proj_dim is not None or config.class_embed_type is not None:
            raise UserError(
                "the UNet wants a guidance or class embedding: consistency-distilled and class-conditional models "
                "are not supported"
            )


class SDXLPolicy(UNetPolicy):
    """Stable Diffusion XL: two text encoders and micro-conditioning.

    Condition: ``prompt_embeds`` (rows, tokens, width), ``pooled_prompt_embeds`` (rows, width) and, after
    :meth:`with_size`, ``time_ids`` (rows, 6). Without them the size is that of the latents, uncropped.
    """

    pipelines = ("StableDiffusionXLPipeline",)
    load_options: ClassVar[Mapping[str, Any]] = {}

    def with_size(self, condition: Condition, sizes: Mapping[str, Any]) -> Condition:
        ids = time_ids(
            sizes["original_size"],
            sizes.get("crop_top_left", (0, 0)),
            sizes.get("target_size", sizes["original_size"]),
            rows=len(condition),
        )
        return Condition({**condition.tensors, "time_ids": ids.to(condition.tensors["prompt_embeds"].device)})

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        encoded = self._pipeline.encode_prompt(
            prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        embeds, pooled = encoded[0], encoded[2]
        if self._pipeline.config.force_zeros_for_empty_prompt:  # then the model's unconditional branch is all zeros
            keep = torch.tensor([prompt != "" for prompt in prompts], device=embeds.device, dtype=embeds.dtype)
            embeds, pooled = embeds * keep[:, None, None], pooled * keep[:, None]
        return Condition({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def _added_conditions(self, latents: Tensor, condition: Condition) -> dict[str, Tensor]:
        ids = condition.tensors.get("time_ids")
        if ids is None:
            size = tuple(side * self.codec.downsampling for side in latents.shape[-2:])
            ids = time_ids(size, (0, 0), size, rows=len(latents))
        pooled = condition.tensors["pooled_prompt_embeds"].to(self.dtype)
        return {"text_embeds": pooled, "time_ids": ids.to(latents.device, self.dtype)}

    def _check_inputs(self) -> None:
        super()._check_inputs()
        if self.config.addition_embed_type != "text_time":
            raise UserError(f"the UNet's additional embedding {self.config.addition_embed_type!r} is not supported")


def time_ids(
    original_size: Tensor | Sequence[int],
    crop_top_left: Tensor | Sequence[int],
    target_size: Tensor | Sequence[int],
    rows: int,
) -> Tensor:
    """Return SDXL's micro-conditioning, (rows, 6) float32.

    Args:
        original_size, crop_top_left, target_size: height (top) before width (left), in pixels; one (2,) for all rows,
            one a row (rows, 2), or one an example (rows / N, 2), which all N blocks share.
        rows: number of rows, in block order.
    """
    parts = []
    for part in (original_size, crop_top_left, target_size):
        pair = torch.as_tensor(part, dtype=torch.float32).reshape(-1, 2)
        if rows % len(pair):
            raise ValueError(f"{len(pair)} sizes do not divide {rows} rows")
        parts.append(pair.repeat(rows // len(pair), 1))
    return torch.cat(parts, dim=1)
