"""Stable Diffusion 3 and 3.5: a policy over ``SD3Transformer2DModel``."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from diffalign.batch import Condition
from diffalign.errors import UserError
from diffalign.policies.components import PipelinePolicy


class SD3Policy(PipelinePolicy):
    """Stable Diffusion 3 and 3.5: two CLIP text encoders, a third (T5) where the model has one.

    Condition: ``prompt_embeds`` (rows, tokens, width) and ``pooled_prompt_embeds`` (rows, width). Timesteps are
    1000 * sigma, the prediction is the velocity noise - latents.
    """

    pipelines = ("StableDiffusion3Pipeline",)
    denoiser = "transformer"

    @property
    def lora_targets(self) -> Sequence[str]:
        image = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0")
        return (*image, "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out")

    @property
    def size_multiple(self) -> int:
        return self.codec.downsampling * self.config.patch_size

    def predict(self, latents: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        output = self.module(
            hidden_states=latents.to(self.dtype),
            timestep=timesteps,
            encoder_hidden_states=condition.tensors["prompt_embeds"].to(self.dtype),
            pooled_projections=condition.tensors["pooled_prompt_embeds"].to(self.dtype),
            return_dict=False,
        )[0]
        return self.adapters.guard(output)

    def _encode_prompts(self, prompts: list[str]) -> Condition:
        embeds, _, pooled, _ = self._pipeline.encode_prompt(
            prompts, None, None, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return Condition({"prompt_embeds": embeds, "pooled_prompt_embeds": pooled})

    def _check_inputs(self) -> None:
        if self.config.in_channels != self.codec.channels:
            raise UserError(
                f"the transformer takes {self.config.in_channels} channels but its VAE gives "
                f"{self.codec.channels}: image-conditioned models are not supported"
            )
