"""The world's tokenizer and text encoders: CLIP's own classes, small, every word one token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from transformers import CLIPTextConfig, CLIPTokenizer

from diffalign.world.grammar import vocabulary

MAX_LENGTH = 20
WORD_END = "</w>"
Pair = tuple[str, str]


def build_tokenizer() -> CLIPTokenizer:
    """Make CLIP's byte-pair tokenizer with merges that turn every word of the grammar into one token.

    Other text still has tokens, down to single characters.
    """
    merges: Any = learn_merges(vocabulary())
    tokens = [*_alphabet(), *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    ids = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=MAX_LENGTH)


def learn_merges(words: Iterable[str]) -> list[Pair]:
    """Merge the most frequent neighbours again and again until every word is one token.

    Ties go to the older tokens, so that the result never depends on hashing, as that of library trainers does.
    """
    pieces = {word: [*word[:-1], word[-1] + WORD_END] for word in words}
    age = {token: index for index, token in enumerate(_alphabet())}
    merges: list[Pair] = []
    while counts := Counter(pair for tokens in pieces.values() for pair in pairwise(tokens)):
        best = min(counts, key=lambda pair: (-counts[pair], age[pair[0]], age[pair[1]]))
        merges.append(best)
        age["".join(best)] = len(age)
        pieces = {word: _merge(tokens, best) for word, tokens in pieces.items()}
    return merges


def _alphabet() -> list[str]:
    """Return all printable characters, first inside and then at the end of a word."""
    characters = [chr(code) for code in range(33, 127)]
    return [*characters, *(character + WORD_END for character in characters)]


def _merge(tokens: list[str], pair: Pair) -> list[str]:
    merged: list[str] = []
    for token in tokens:
        if merged and (merged[-1], token) == pair:
            merged[-1] += token
        else:
            merged.append(token)
    return merged


def text_config(tokenizer: CLIPTokenizer, width: int, layers: int = 2, projection: int = 96) -> CLIPTextConfig:
    """Return the configuration of a small CLIP text encoder."""
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_LENGTH,
        projection_dim=projection,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_act="gelu",
    )
