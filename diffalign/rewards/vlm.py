"""Vision-language models as judges: questions about pictures, answers, and a record of what was answered.

A model is a folder or hub name of transformers (``local_vlm.py``) or a server (``endpoint.py``). Answers are kept as
they come, so that a run that breaks off asks only what is left.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError


@dataclass(frozen=True)
class Question:
    """What is asked.

    Args:
        pictures: shown before the text.
        text: the question.
        words: where the probabilities of these as the answer's first word are wanted instead of the answer.
        template: name and version of the wording; answers to other versions are not used again.
    """

    pictures: Sequence[Image.Image]
    text: str
    words: tuple[str, ...] = ()
    template: str = ""


@dataclass(frozen=True)
class Answer:
    """What came back.

    Args:
        text: the answer.
        words: probability of each wanted word, in [0, 1].
    """

    text: str
    words: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class NotAnswered:
    """A question that a server did not answer.

    Args:
        reason: one line.
    """

    reason: str


class VisionLanguageModel(ABC):
    """Answers questions about pictures, always alike (greedily).

    Attributes:
        name: tells it from other models in records.
    """

    name: str

    @abstractmethod
    def ask(self, questions: Sequence[Question]) -> list[Answer | NotAnswered]:
        """Answer in the order of the questions."""


class Transcript:
    """Answers by question, in memory and, one JSON line each, in a file.

    Args:
        model: answers what is not there yet.
        path: the file; by default one for each model under :func:`transcripts_folder`.
    """

    def __init__(self, model: VisionLanguageModel, path: Path | None = None) -> None:
        self.model = model
        safe = "".join(c if c.isalnum() or c in "-._" else "-" for c in model.name)
        self.path = path or transcripts_folder() / f"{safe}.jsonl"
        self._known: dict[str, Answer] = {}
        self._lock = threading.Lock()
        if self.path.is_file():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                self._remember(line)

    def ask(self, questions: Sequence[Question]) -> list[Answer]:
        """Answer all, from the record where it knows.

        Raises:
            UserError: if the model leaves questions unanswered; what it did answer is kept.
        """
        keys = [self._key(question) for question in questions]
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in self._known}
        answers = self.model.ask(list(missing.values()))
        failures = [answer for answer in answers if isinstance(answer, NotAnswered)]
        self._keep({k: a for k, a in zip(missing, answers, strict=True) if isinstance(a, Answer)})
        if failures:
            raise UserError(
                f"{len(failures)} of {len(questions)} questions to {self.model.name} are unanswered: "
                f"{failures[0].reason}. Answers so far are kept in {self.path}; the same command continues from there"
            )
        return [self._known[key] for key in keys]

    def _key(self, question: Question) -> str:
        digest = hashlib.sha256()
        for part in (self.model.name, question.template, question.text, "\n".join(question.words)):
            digest.update(part.encode() + b"\0")
        for picture in question.pictures:
            digest.update(f"{picture.size}{picture.mode}".encode() + picture.tobytes())
        return digest.hexdigest()

    def _keep(self, answers: Mapping[str, Answer]) -> None:
        if not answers:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [json.dumps({"key": k, "text": a.text, "words": dict(a.words)}) for k, a in answers.items()]
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write("".join(row + "\n" for row in rows))
        self._known.update(answers)

    def _remember(self, line: str) -> None:
        try:
            row = json.loads(line)
            self._known[row["key"]] = Answer(row["text"], row["words"])
        except (ValueError, KeyError, TypeError):
            # The last line of a run that was killed while it wrote: that question is asked again.
            return


def transcripts_folder() -> Path:
    """Return the folder of answers, ``$DIFFALIGN_TRANSCRIPTS``, else ``~/.cache/diffalign/transcripts``."""
    given = os.environ.get("DIFFALIGN_TRANSCRIPTS")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "diffalign" / "transcripts"


def to_pictures(images: Tensor) -> list[Image.Image]:
    """Turn images (batch, 3, height, width) in [0, 1] into pictures of whole grey levels."""
    pixels = (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(image) for image in pixels]


def load_vlm(
    source: str, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32
) -> VisionLanguageModel:
    """Reach a model.

    Args:
        source: ``http://HOST:PORT/v1`` or ``http://HOST:PORT/v1#MODEL`` of an OpenAI-compatible server; else an
            image-text-to-text model of transformers by local folder or hub name.
        device, dtype: where and how a local model runs.

    Raises:
        UserError: if there is no such model, or the server does not answer.
    """
    if source.startswith(("http://", "https://")):
        from diffalign.rewards.endpoint import Endpoint

        return Endpoint(source)
    from diffalign.rewards.local_vlm import LocalModel

    return LocalModel.load(source, device, dtype)
