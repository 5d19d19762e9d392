"""Tiny random language models of the real classes with a word-level tokenizer; nothing is fetched."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import nn

from diffalign.policies.adapters import LoraSettings
from diffalign.text.policy import TextPolicy

WORDS = ("a", "photo", "of", "red", "blue", "circle", "star", "and", ":", ",", "cat", "dog", "on", "the", "mat", "hi")
CHAT = (
    "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' + eos_token + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant ' }}{% endif %}"
)


def word_tokenizer() -> Any:
    """Make a tokenizer of one token a word, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<bos>", "<eos>", "<unk>", "user", "assistant", *WORDS]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        model_max_length=64,
    )
    tokenizer.chat_template = CHAT
    return tokenizer


def tiny_model(family: Literal["llama", "gpt2"] = "llama", seed: int = 0) -> nn.Module:
    """Make a random model of some thousand weights."""
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    common = {"vocab_size": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if family == "gpt2":
            silent = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
            return GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, n_positions=64, **common, **silent))
        config = LlamaConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=64,
            initializer_range=0.3,
            **common,
        )
        return LlamaForCausalLM(config)


def tiny_text_policy(
    family: Literal["llama", "gpt2"] = "llama", adapter: bool = True, dtype: torch.dtype = torch.float32
) -> TextPolicy:
    """Make a policy over a tiny model, with the trainable adapter "default" if wanted."""
    policy = TextPolicy(tiny_model(family).to(dtype), word_tokenizer(), {"base_model": "tiny"})
    if adapter:
        policy.adapters.add("default", LoraSettings(rank=4))
    return policy
