"""A vision-language model of transformers on this machine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from diffalign.errors import UserError
from diffalign.rewards.vlm import Answer, NotAnswered, Question, VisionLanguageModel

MAX_NEW_TOKENS = 1024
"""Longest answer."""


class LocalModel(VisionLanguageModel):
    """Any image-text-to-text model with a chat template; build it with :meth:`load`.

    Args:
        model, processor: of transformers.
        name: tells it from others.
        batch_size: questions answered at once.
        max_new_tokens: longest answer.
    """

    def __init__(
        self, model: Any, processor: Any, name: str, batch_size: int = 8, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> None:
        self.model, self.processor, self.name = model.requires_grad_(False).eval(), processor, name
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        # Answers grow at the right end of every row.
        processor.tokenizer.padding_side = "left"

    @classmethod
    def load(
        cls, source: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, **options: Any
    ) -> LocalModel:
        """Load by local folder or hub name.

        Args:
            source: the model with its processor.
            device, dtype: where and how it runs.
            options: of the class.

        Raises:
            UserError: if it cannot be loaded.
        """
        from transformers import AutoModelForImageTextToText, AutoProcessor

        try:
            processor = AutoProcessor.from_pretrained(source)
            model: Any = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype)
        except (OSError, ValueError, ImportError) as problem:
            reason = str(problem).strip().splitlines()[0]
            raise UserError(
                f"cannot load the vision-language model {source}: {reason}. Give a folder or hub name of an "
                "image-text-to-text model, or a server as http://HOST:PORT/v1; some processors need torchvision"
            ) from problem
        if not getattr(processor, "chat_template", None):
            raise UserError(f"{source} has no chat template: a model that was made to answer questions is needed")
        return cls(model.to(device), processor, source, **options)

    @torch.no_grad()
    def ask(self, questions: Sequence[Question]) -> list[Answer | NotAnswered]:
        """Answer in batches of questions of one kind."""
        answers: dict[int, Answer] = {}
        kinds = {(len(question.pictures), question.words) for question in questions}
        for kind in sorted(kinds):
            rows = [i for i, question in enumerate(questions) if (len(question.pictures), question.words) == kind]
            for start in range(0, len(rows), self.batch_size):
                batch = rows[start : start + self.batch_size]
                answers.update(zip(batch, self._answer([questions[i] for i in batch], kind[1]), strict=True))
        return [answers[i] for i in range(len(questions))]

    def _answer(self, questions: Sequence[Question], words: Sequence[str]) -> list[Answer]:
        texts = [
            self.processor.apply_chat_template(
                [
                    {
                        "role": "user",
                        "content": [
                            *({"type": "image"} for _ in question.pictures),
                            {"type": "text", "text": question.text},
                        ],
                    }
                ],
                add_generation_prompt=True,
            )
            for question in questions
        ]
        pictures = [list(question.pictures) for question in questions]
        inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt")
        inputs = inputs.to(self.model.device, self.model.dtype)
        output = self.model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=1 if words else self.max_new_tokens,
            return_dict_in_generate=True,
            output_logits=bool(words),
        )
        new = output.sequences[:, inputs["input_ids"].shape[1] :]
        replies = self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)
        if not words:
            return [Answer(reply) for reply in replies]
        probabilities = output.logits[0].float().softmax(-1)  # (batch, vocabulary)
        columns = {word: probabilities[:, self._first_tokens(word)].amax(-1).tolist() for word in words}
        return [Answer(reply, {w: columns[w][row] for w in words}) for row, reply in enumerate(replies)]

    def _first_tokens(self, word: str) -> list[int]:
        """Tokens that begin a word, written at the start or after a blank: the likelier counts.

        Raises:
            UserError: if the vocabulary does not have the word as one token.
        """
        encoded = [self.processor.tokenizer(text, add_special_tokens=False).input_ids for text in (word, f" {word}")]
        found = sorted({tokens[0] for tokens in encoded if len(tokens) == 1})
        if not found:
            raise UserError(f"{self.name} has no single token for {word!r}: VQAScore needs one")
        return found
