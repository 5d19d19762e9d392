"""From text examples to batches: tokens, and masks that say which of them are completions.

Sequences are padded on the right. A completion's end-of-sequence token counts as its last token. Prompt and completion
are tokenised apart, so their border is exact and what is trained on is what generation sees; a conversation goes
through the tokenizer's chat template as a whole, and its completion is what the template adds to the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.batch import TextBatch
from diffalign.data.fields import field_tensors
from diffalign.data.loader import MicroBatch
from diffalign.errors import UserError
from diffalign.text.data import Message, Text, TextExample, TextSet
from diffalign.text.policy import TextPolicy


@dataclass(frozen=True)
class Tokenized:
    """Tokens of a prompt and of one completion of it, end-of-sequence included."""

    prompt: tuple[int, ...]
    completion: tuple[int, ...]


class TextEncoder:
    """Turns micro-batches of text examples into :class:`TextBatch`.

    Args:
        policy: gives tokenizer and device.
        max_length: longest sequence in tokens, prompt and completion together; 0 for the model's own. A longer one
            loses the beginning of its prompt, never a part of its completion.

    Example::

        encoder = TextEncoder(policy)
        dataset = encoder.precompute(load_text_pairs("bundled"))
        loader = ExampleLoader(dataset.examples, LoaderOptions(micro_batch=8))
        for micro_batches in loader:
            batches = [encoder(micro) for micro in micro_batches]
    """

    def __init__(self, policy: TextPolicy, max_length: int = 0) -> None:
        self._policy = policy
        self._tokenizer = policy.tokenizer
        self.max_length = max_length or policy.max_length
        self._known: dict[str, tuple[Tokenized, ...]] = {}

    def __call__(self, micro: MicroBatch[TextExample]) -> TextBatch:
        """Encode a micro-batch: rows in block order, all chosen completions first, on the policy's device.

        Raises:
            UserError: naming an example whose completion is longer than the model's context.
        """
        examples = micro.examples
        tokenized = [self._known.get(example.id) or self.tokenize(example) for example in examples]
        for example, rows in zip(examples, tokenized, strict=True):
            if not self._fits(rows):
                raise UserError(
                    f"example {example.id}: a completion has more tokens than fit beside one of its prompt into "
                    f"{self.max_length}: leave it out, or choose a model with a longer context"
                )
        in_blocks = [rows[block] for block in range(len(tokenized[0])) for rows in tokenized]
        device = self._policy.device
        padded = self._padded(in_blocks)
        return TextBatch(
            ids=[example.id for example in examples],
            seeds=micro.seeds,
            prompts=[example.shown_prompt for example in examples],
            fields=field_tensors(examples, device),
            cache_keys=[example.id for example in examples],  # nothing is drawn: values depend on the example alone
            completions_per_prompt=len(tokenized[0]),
            input_ids=padded["input_ids"].to(device),
            attention_mask=padded["attention_mask"].to(device),
            completion_mask=padded["completion_mask"].to(device),
        )

    def precompute(self, dataset: TextSet) -> TextSet:
        """Tokenise a whole data set once; leave out the examples with a completion too long for the model, counted.

        Raises:
            UserError: if none is left, or a conversation cannot be tokenised.
        """
        kept = []
        for example in dataset.examples:
            rows = self.tokenize(example)
            if self._fits(rows):
                self._known[example.id] = rows
                kept.append(example)
        dropped = {f"completions longer than {self.max_length} tokens dropped": len(dataset) - len(kept)}
        return dataset.with_examples(kept, dropped)

    def tokenize(self, example: TextExample) -> tuple[Tokenized, ...]:
        """Return the tokens of each completion with its prompt.

        Raises:
            UserError: if the tokenizer cannot format a conversation.
        """
        if isinstance(example.prompt, str):
            return tuple(self._plain(example.prompt, completion) for completion in example.completions)
        return tuple(self._chat(example.id, example.prompt, completion) for completion in example.completions)

    def _plain(self, prompt: str, completion: Text) -> Tokenized:
        assert isinstance(completion, str)
        end = self._tokenizer.eos_token_id
        written = self._tokenizer(completion, add_special_tokens=False)["input_ids"]
        if not written or written[-1] != end:
            written = [*written, end]
        return Tokenized(tuple(self._tokenizer(prompt)["input_ids"]), tuple(written))

    def _chat(self, identity: str, prompt: Sequence[Message], completion: Text) -> Tokenized:
        assert not isinstance(completion, str)
        if not self._tokenizer.chat_template:
            raise UserError(
                f"example {identity} is a conversation, but the tokenizer has no chat template: use an instruct model, "
                "or plain text"
            )
        before = self._format(prompt, add_generation_prompt=True)
        whole = self._format([*prompt, *completion], add_generation_prompt=False)
        if whole[: len(before)] != before or len(whole) == len(before):
            raise UserError(
                f"example {identity}: the chat template does not continue the formatted prompt by the completion, so "
                "their border is unknown: does the prompt end with the user's message?"
            )
        return Tokenized(tuple(before), tuple(whole[len(before) :]))

    def _format(self, messages: Sequence[Message], add_generation_prompt: bool) -> list[int]:
        arguments: Mapping[str, Any] = {"tokenize": True, "return_dict": False}
        formatted = self._tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=add_generation_prompt, **arguments
        )
        return list(formatted)

    def _fits(self, rows: Sequence[Tokenized]) -> bool:
        return all(len(row.completion) < self.max_length for row in rows)

    def _padded(self, rows: Sequence[Tokenized]) -> dict[str, Tensor]:
        prompts = [self._context(row) for row in rows]
        length = max(len(p) + len(row.completion) for p, row in zip(prompts, rows, strict=True))
        shape = (len(rows), length)
        ids = torch.full(shape, self._tokenizer.pad_token_id)
        attention, completion = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
        for index, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
            border, end = len(prompt), len(prompt) + len(row.completion)
            ids[index, :end] = torch.tensor([*prompt, *row.completion])
            attention[index, :end] = 1
            completion[index, border:end] = 1
        return {"input_ids": ids, "attention_mask": attention, "completion_mask": completion}

    def _context(self, row: Tokenized) -> tuple[int, ...]:
        """Return the prompt without what does not fit; never empty, as the first token needs something before it."""
        start = self._tokenizer.bos_token_id
        prompt = row.prompt or (start if start is not None else self._tokenizer.eos_token_id,)
        return prompt[max(0, len(prompt) + len(row.completion) - self.max_length) :]
