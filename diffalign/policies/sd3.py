"""Stable Diffusion 3 and 3.5: a policy over ``SD3Transformer2DModel``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from diffalign.batch import Condition
from diffalign.errors import UserError
from diffalign.policies.attention import dispatch_attention, takes_token_counts
from diffalign.policies.components import PipelinePolicy

T5_LENGTH = 256
"""Tokens of the third text encoder, ``max_sequence_length`` of the stock pipeline; zeros where there is none."""


class SD3Policy(PipelinePolicy):
    """Stable Diffusion 3 and 3.5: two CLIP text encoders, a third (T5) where the model has one.

    Condition: ``prompt_embeds`` (rows, tokens, width) and ``pooled_prompt_embeds`` (rows, width); without a third
    encoder, on a CPU, also ``token_counts`` (rows, tokens), by which one zero token does the work of the stock 256.
    Timesteps are 1000 * sigma, the prediction is the velocity noise - latents.
    """

    pipelines = ("StableDiffusion3Pipeline",)
    denoiser = "transformer"
    sigma_spacing = "table"

    def __init__(self, pipeline: Any, source: Mapping[str, Any] | None = None) -> None:
        super().__init__(pipeline, source)
        self._has_t5 = pipeline.text_encoder_3 is not None
        if not self._has_t5:
            dispatch_attention(self.module, "native")

    @property
    def lora_targets(self) -> Sequence[str]:
        image = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
        return (*image, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")

    @property
    def encoder_id(self) -> str:  # type: ignore[override]
        return f"{super().encoder_id}{'-counted' if self._counts_tokens else ''}"

    @property
    def size_multiple(self) -> int:
        return self.codec.downsampling * self.config.patch_size

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        counts = condition.tensors.get("token_counts")
        output = self.module(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=condition.tensors["prompt_embeds"].to(self.dtype),
            pooled_projections=condition.tensors["pooled_prompt_embeds"].to(self.dtype),
            joint_attention_kwargs=None if counts is None else {"token_counts": counts},
            return_dict=False,
        )[0]
        return self.adapters.guard(output)

    @property
    def _counts_tokens(self) -> bool:
        # on a GPU the bias of counted tokens would cost the fastest attention kernels, which take none
        return not self._has_t5 and takes_token_counts(self.module) and self.device.type == "cpu"

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        counted = self._counts_tokens
        embeds, _, pooled, _ = self._pipeline.encode_prompt(
            prompts,
            None,
            None,
            device=self.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            max_sequence_length=1 if counted else T5_LENGTH,
        )
        condition = {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}
        if counted:
            counts = torch.ones(embeds.shape[:2], device=embeds.device)
            counts[:, -1] = T5_LENGTH
            condition["token_counts"] = counts
        return Condition(condition)

    def _check_inputs(self) -> None:
        if self.config.in_channels != self.codec.channels:
            raise UserError(
                f"the transformer takes {self.config.in_channels} channels but its VAE gives "
                f"{self.codec.channels}: image-conditioned models are not supported"
            )
