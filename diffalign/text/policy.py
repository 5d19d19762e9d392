"""Any causal language model of transformers as a policy."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.policies.adapters import DEFAULT_ADAPTER
from diffalign.policies.base import BasePolicy
from diffalign.text.generation import sample_completions
from diffalign.text.logprobs import token_log_probs
from diffalign.text.saving import save_model, save_peft_adapter


class TextPolicy(BasePolicy):
    """A causal language model with its tokenizer.

    Args:
        module: the model; its weights are frozen.
        tokenizer: with an end-of-sequence token; a missing padding token is replaced by it.
        source: what loads it again, ``base_model`` first; recorded in what is saved.

    Raises:
        UserError: if the tokenizer has no end-of-sequence token.
    """

    def __init__(self, module: nn.Module, tokenizer: Any, source: Mapping[str, str] | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no end-of-sequence token: completions could not end")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        self.tokenizer = tokenizer
        self.source = dict(source or {})
        module.requires_grad_(False).eval()
        self._targets = _linear_layers(module)
        self._keeps_logits = "logits_to_keep" in inspect.signature(module.forward).parameters
        super().__init__(module)

    @property
    def lora_targets(self) -> Sequence[str]:
        """All linear layers but the one that gives the logits."""
        return self._targets

    @property
    def max_length(self) -> int:
        """Longest sequence that model and tokenizer are made for, in tokens."""
        positions = getattr(self.module.config, "max_position_embeddings", None)
        return int(min(positions or self.tokenizer.model_max_length, self.tokenizer.model_max_length))

    def token_log_probs(self, input_ids: Tensor, attention_mask: Tensor, completion_mask: Tensor) -> Tensor:
        """Log-probability of each token of the completions given what stands before it; temperature 1.

        Args:
            input_ids, attention_mask, completion_mask: (rows, length) int64, padded on the right; see ``TextBatch``.

        Returns:
            (rows, length - 1) float32 or wider: column ``t`` for token ``t + 1``, 0 outside the completions.
        """
        first = _first_column(completion_mask)
        arguments: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask, "use_cache": False}
        if self._keeps_logits:  # none for the prompts' common columns
            arguments["logits_to_keep"] = input_ids.shape[1] - first + 1
        logits = self.module(**arguments).logits[:, first - input_ids.shape[1] - 1 : -1]
        values = token_log_probs(logits, input_ids[:, first:])
        values = torch.where(completion_mask[:, first:].bool(), values, torch.zeros_like(values))
        return self.adapters.guard(F.pad(values, (first - 1, 0)))

    def generate(
        self,
        prompts: Sequence[str],
        seeds: Tensor,
        *,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        batch_size: int = 64,
    ) -> list[str]:
        """Continue prompts; see :func:`diffalign.text.generation.sample_completions`."""
        completions: list[str] = []
        with self.inference():
            for rows in torch.arange(len(prompts)).split(batch_size):
                completions += sample_completions(
                    self.module,
                    self.tokenizer,
                    [prompts[row] for row in rows.tolist()],
                    seeds[rows],
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                )
        return completions

    def save(self, folder: Path, metadata: Mapping[str, str]) -> None:
        """Write the trained adapter in peft's format, or the whole model where its own weights were trained.

        Raises:
            UserError: if it cannot be written; then nothing is left behind.
        """
        metadata = {**self.source, **metadata}
        if DEFAULT_ADAPTER in self.adapters.names:
            save_peft_adapter(folder, self.adapters, DEFAULT_ADAPTER, metadata)
        else:
            save_model(folder, self.module, self.tokenizer, metadata)


def _first_column(completion_mask: Tensor) -> int:
    """Return the first column in which any row has a token of its completion; at least 1."""
    columns = completion_mask[:, 1:].any(dim=0).nonzero()
    return int(columns[0]) + 1 if len(columns) else completion_mask.shape[1] - 1


def _linear_layers(module: nn.Module) -> tuple[str, ...]:
    from transformers.pytorch_utils import Conv1D

    head = getattr(module, "get_output_embeddings", lambda: None)()
    layers = [
        path for path, part in module.named_modules() if isinstance(part, nn.Linear | Conv1D) and part is not head
    ]
    return tuple(sorted({path.rsplit(".", 1)[-1] for path in layers}))
