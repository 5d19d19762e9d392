"""Text runs: language models, preference data of text, held-out rewards."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffalign.data.readers import SourceOptions
from diffalign.data.schema import describe_notes
from diffalign.errors import UserError
from diffalign.policies.adapters import START_ADAPTER
from diffalign.strategies.base import DataKind
from diffalign.text.data import TextSet, load_text_pairs
from diffalign.text.encode import TextEncoder
from diffalign.text.evaluation import writer_evaluator
from diffalign.text.loading import load_text_adapter, load_text_policy
from diffalign.text.logprobs import token_log_probs
from diffalign.text.observer import TextObserver
from diffalign.text.policy import TextPolicy
from diffalign.training.config import DataOptions, ModelOptions, TrainConfig
from diffalign.training.domain import EVALUATION_SEED, EVALUATION_SPLIT, Domain, LoadedData
from diffalign.training.memory import saved_bytes
from diffalign.training.observing import Observer, OnMain
from diffalign.training.processes import Processes

_TYPICAL_TOKENS = 1024
"""Length of a row in estimates of memory, where no ``--max_length`` is given and the model takes longer ones."""


class TextDomain(Domain):
    """Causal language models."""

    library = "transformers"

    def load_policy(self, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> TextPolicy:
        policy = load_text_policy(
            options.pretrained_model_name_or_path,
            dtype=torch.float32 if options.train_mode == "full" else dtype,
            device=device,
            revision=options.revision,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        if options.start_adapter:
            load_text_adapter(policy, Path(options.start_adapter), START_ADAPTER)
        return policy

    def read_data(self, source: Any, kind: DataKind, config: TrainConfig) -> TextSet:
        if kind != "pairs":
            raise UserError(f"text data of kind {kind!r} cannot be read yet: only pairs of completions can")
        return load_text_pairs(source, _source_options(config.data))

    def prepare_data(
        self,
        dataset: TextSet,
        config: TrainConfig,
        policy: TextPolicy,
        processes: Processes,
        console: Console | None = None,
    ) -> LoadedData:
        encoder = TextEncoder(policy, config.data.max_length)
        dataset = encoder.precompute(dataset)
        notes = (f"data {dataset.name}: {len(dataset)} pairs; {describe_notes(dataset.notes)}",)
        return LoadedData(dataset.examples, encoder, rows_per_example=2, notes=notes)

    def activation_bytes(self, policy: TextPolicy, config: TrainConfig) -> int:
        length = config.data.max_length or min(policy.max_length, _TYPICAL_TOKENS)
        tokens = torch.zeros(1, length, dtype=torch.long, device="meta")
        whole = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")  # a finished mask is not looked into

        def pass_through(module: torch.nn.Module) -> torch.Tensor:
            output = module(input_ids=tokens, attention_mask=whole, use_cache=False)
            return token_log_probs(output.logits, tokens)

        return saved_bytes(policy.module, pass_through)

    def observer(
        self,
        policy: TextPolicy,
        dataset: TextSet,
        config: TrainConfig,
        judges: Mapping[str, Any],
        processes: Processes,
        console: Any,
    ) -> Observer | None:
        count = config.run.evaluation_prompts
        if not count or not dataset.bundled:
            return None
        evaluator = writer_evaluator(EVALUATION_SPLIT, count, EVALUATION_SEED)
        return OnMain(TextObserver(policy, evaluator, console), processes)


def _source_options(options: DataOptions) -> SourceOptions:
    return SourceOptions(
        split=options.train_split,
        config=options.dataset_config_name,
        data_format=options.data_format,
        column_map=options.column_map,
        streaming=options.streaming,
        max_samples=options.max_train_samples,
    )
