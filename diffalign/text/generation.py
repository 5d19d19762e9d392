"""Sampling completions from a causal language model, reproducibly: every row has its own random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.diffusion.random import row_generators


@torch.no_grad()
def sample_completions(
    module: nn.Module,
    tokenizer: Any,
    prompts: Sequence[str],
    seeds: Tensor,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
) -> list[str]:
    """Continue prompts until the end-of-sequence token; the caller puts the module in eval mode.

    A row's text depends on its own seed and prompt alone, so two models compared on the same seeds see the same luck.

    Args:
        module: a transformers causal language model.
        tokenizer: its tokenizer, with padding and end-of-sequence tokens.
        prompts: B texts, taken as they are.
        seeds: (B,) int64.
        max_new_tokens: where a completion is cut.
        temperature: of the softmax; 0 takes the likeliest token.

    Returns:
        B completions, special tokens left out.
    """
    device = next(module.parameters()).device
    encoded = [tokenizer(prompt, return_attention_mask=False)["input_ids"] for prompt in prompts]
    tokens, mask = pad_left(encoded, tokenizer.pad_token_id, device)
    drawn = torch.stack([torch.rand(max_new_tokens, generator=g) for g in row_generators(seeds, "completion")])
    drawn = drawn.to(device)
    written = torch.full((len(prompts), max_new_tokens), tokenizer.pad_token_id, device=device)
    finished = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    past = None
    for step in range(max_new_tokens):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
        output = module(
            input_ids=tokens, attention_mask=mask, position_ids=positions, past_key_values=past, use_cache=True
        )
        past = output.past_key_values
        chosen = _choose(output.logits[:, -1].float(), drawn[:, step], temperature)
        chosen = torch.where(finished, tokenizer.pad_token_id, chosen)
        written[:, step] = chosen
        finished = finished | (chosen == tokenizer.eos_token_id)
        if bool(finished.all()):
            break
        tokens = chosen[:, None]
        mask = torch.cat([mask, torch.ones_like(tokens)], dim=1)
    return list(tokenizer.batch_decode(written, skip_special_tokens=True))


def pad_left(rows: Sequence[Sequence[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Pad token lists on the left to one length; return tokens and mask, (rows, length) int64 each."""
    length = max(len(row) for row in rows)
    tokens = torch.tensor([[pad] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return tokens, mask


def _choose(logits: Tensor, drawn: Tensor, temperature: float) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    cumulative = (logits / temperature).softmax(dim=-1).cumsum(dim=-1)
    below = cumulative < drawn[:, None] * cumulative[:, -1:]
    return below.sum(dim=-1).clamp(max=logits.shape[-1] - 1)
