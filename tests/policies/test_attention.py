"""Attention through diffusers' dispatcher equals the stock processors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import SD3Transformer2DModel
from diffusers.models import attention_dispatch

from diffalign.errors import MissingExtra, UserError
from diffalign.policies.attention import (
    DispatchedAttention,
    dispatch_attention,
    set_attention_backend,
    takes_token_counts,
)
from diffalign.policies.sd3 import T5_LENGTH
from tests.factories import image_batch, tiny_policy, vae


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3"])
def test_dispatched_attention_equals_stock(family: str) -> None:
    policy = tiny_policy(family, lora=True)
    batch = image_batch(policy)
    timesteps = policy.process.timestep_at(torch.tensor([10, 500, 10, 500]))
    stock = policy.predict(batch.latents, timesteps, batch.condition)
    dispatch_attention(policy.module, "native")
    ours = policy.predict(batch.latents, timesteps, batch.condition)
    torch.testing.assert_close(ours, stock)
    ours.square().mean().backward()
    assert all(p.grad is not None for p in policy.adapters.parameters())


def sd35() -> SD3Transformer2DModel:
    """A transformer with normalised queries and keys, and with a second attention of the image to itself."""
    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=8,
        caption_projection_dim=16,
        pooled_projection_dim=8,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
        qk_norm="rms_norm",
    )


def sd35_inputs() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 4, 8, 8), torch.randn(2, 3, 8), torch.randn(2, 8), torch.tensor([10.0, 500.0])


def test_normalised_and_dual_attention_of_sd35() -> None:
    model, inputs = sd35(), sd35_inputs()
    with torch.no_grad():
        stock = model(*inputs).sample
        dispatch_attention(model, "native")
        assert all(isinstance(p, DispatchedAttention) for p in model.attn_processors.values())
        torch.testing.assert_close(model(*inputs).sample, stock)


def test_kernels_are_given_one_type_in_mixed_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 weights under autocast: the norms of queries and keys compute in float32, projections do not."""
    given: set[torch.dtype] = set()
    dispatch = attention_dispatch.dispatch_attention_fn

    def told(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any) -> torch.Tensor:
        given.update({query.dtype, key.dtype, value.dtype})
        return dispatch(query, key, value, **options)

    monkeypatch.setattr(attention_dispatch, "dispatch_attention_fn", told)
    model = sd35()
    dispatch_attention(model, "native")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(*sd35_inputs())
    assert given == {torch.bfloat16}


def test_one_zero_token_stands_for_those_of_the_absent_third_encoder() -> None:
    policy = tiny_policy("sd3", lora=True)
    captions, timesteps = ["a red cat", "two"], torch.tensor([300.0, 700.0])
    counted, identity = policy.encode_prompts(captions), policy.encoder_id
    dispatch_attention(policy.module, "flash")  # takes no bias, so that captions are encoded in full
    assert not takes_token_counts(policy.module)
    full = policy.encode_prompts(captions)
    assert policy.encoder_id != identity  # a cache of the ones is not asked for the others
    dispatch_attention(policy.module, "native")
    short, long = (condition.tensors["prompt_embeds"].shape[1] for condition in (counted, full))
    assert long - short == T5_LENGTH - 1
    assert "token_counts" not in full.tensors
    latents = torch.randn(2, *policy.latent_shape(*policy.default_resolution))
    gradients = []
    for condition in (counted, full):
        prediction = policy.predict(latents, timesteps, condition)
        loss = prediction.square().mean()
        gradients.append((prediction, *torch.autograd.grad(loss, list(policy.adapters.parameters()))))
    for ours, stock in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-6)


def test_sdpa_leaves_the_model_alone() -> None:
    module = tiny_policy("sd").module
    before = dict(module.attn_processors)
    set_attention_backend(module, "sdpa")
    assert module.attn_processors == before


def test_mistakes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = torch.nn.Identity()
    with pytest.raises(UserError, match="did you mean 'xformers'"):
        set_attention_backend(module, "xformer")  # type: ignore[arg-type]
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="needs a GPU"):
        set_attention_backend(module, "flex")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtra, match=r"diffalign\[xformers\]"):
        set_attention_backend(module, "xformers")
    with pytest.raises(UserError, match="flash-attn"):
        set_attention_backend(module, "flash")


def test_layers_with_norms_inside_are_refused() -> None:
    with pytest.raises(UserError, match="use sdpa"):
        dispatch_attention(vae(), "native")


def test_masks_are_refused() -> None:
    with pytest.raises(ValueError, match="no mask"):
        DispatchedAttention("native")(None, torch.zeros(1, 1, 1), attention_mask=torch.ones(1))
