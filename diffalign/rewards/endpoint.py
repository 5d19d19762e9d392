"""A vision-language model behind an OpenAI-compatible server: one question about pictures, one answer.

A question that fails is asked again after a pause; when it goes on failing an error says so, and nothing is made up.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from diffalign.errors import UserError
from diffalign.rewards.vlm import Answer, NotAnswered, Question, VisionLanguageModel

_JPEG_QUALITY = 95
"""As in UnifiedReward's client."""
_RETRIED = frozenset({408, 409, 425, 429})
"""Statuses below 500 that another try may fix."""
_TOP = 20
"""Likeliest first tokens asked for; the most that servers give."""


@dataclass(frozen=True)
class EndpointOptions:
    """How a server is asked. Defaults are those of UnifiedReward's client but for the number of tries.

    Args:
        timeout: seconds for the first try; each further try gets ``patience`` more.
        patience: see ``timeout``.
        tries: how often a question is asked before it counts as unanswered. 5: the client's 10 take over a minute.
        longest_pause: seconds; pauses double from 1.
        max_tokens: longest answer.
        parallel: questions under way at once. 8.
    """

    timeout: float = 30.0
    patience: float = 5.0
    tries: int = 5
    longest_pause: float = 10.0
    max_tokens: int = 4096
    parallel: int = 8

    def __post_init__(self) -> None:
        if min(self.tries, self.parallel, self.max_tokens) < 1 or self.timeout <= 0:
            raise UserError("an endpoint needs tries, parallel and max_tokens of at least 1 and a time-out above 0")


class Endpoint(VisionLanguageModel):
    """An OpenAI-compatible server.

    Args:
        address: its base, ``http://HOST:PORT/v1``; after ``#`` the name of the model, else the first that it lists.
        options: how it is asked.
        key: sent as a bearer token; ``$OPENAI_API_KEY`` by default.
        pause: waits for seconds; tests replace it.

    Raises:
        UserError: for an address without a host, or if the server does not say which models it has.
    """

    def __init__(
        self,
        address: str,
        options: EndpointOptions | None = None,
        key: str | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        base, _, model = address.partition("#")
        if not urllib.parse.urlsplit(base).hostname:
            raise UserError(f"{base!r} is not the address of a server; expected http://HOST:PORT/v1")
        self.base, self.options, self.pause = base.rstrip("/"), options or EndpointOptions(), pause
        self._key = key if key is not None else os.environ.get("OPENAI_API_KEY", "")
        self.name = model or self._first_model()

    def ask(self, questions: Sequence[Question]) -> list[Answer | NotAnswered]:
        """Ask all, several at once; answers in the order of the questions."""
        with ThreadPoolExecutor(self.options.parallel) as pool:
            return list(pool.map(self._ask, questions))

    def _ask(self, question: Question) -> Answer | NotAnswered:
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": data_uri(picture)}} for picture in question.pictures
        ]
        body: dict[str, Any] = {
            "model": self.name,
            "messages": [{"role": "user", "content": [*content, {"type": "text", "text": question.text}]}],
            "temperature": 0,
            "max_tokens": 1 if question.words else self.options.max_tokens,
        }
        if question.words:
            body |= {"logprobs": True, "top_logprobs": _TOP}
        try:
            choice = self._post("/chat/completions", body)["choices"][0]
            text = choice["message"]["content"] or ""
            return Answer(text, _word_probabilities(choice, question.words))
        except UserError as problem:
            return NotAnswered(str(problem))
        except (KeyError, IndexError, TypeError) as problem:
            return NotAnswered(f"{self.base} answered in another format than OpenAI's ({problem!r})")

    def _first_model(self) -> str:
        try:
            return str(self._post("/models", None)["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as problem:
            raise UserError(f"{self.base}/models lists no model; name one: {self.base}#MODEL") from problem

    def _post(self, path: str, body: Mapping[str, Any] | None) -> Any:
        """Send JSON (or get, without a body) and read JSON, with tries and pauses."""
        reason = ""
        for attempt in range(self.options.tries):
            if attempt:
                self.pause(min(2.0 ** (attempt - 1), self.options.longest_pause))
            seconds = self.options.timeout + self.options.patience * attempt
            try:
                return self._send(path, body, seconds)
            except urllib.error.HTTPError as problem:
                reason = f"status {problem.code}: {problem.read(200).decode(errors='replace').strip()}"
                if problem.code < 500 and problem.code not in _RETRIED:
                    break
            except (TimeoutError, urllib.error.URLError, ConnectionError, http.client.HTTPException) as problem:
                late = isinstance(getattr(problem, "reason", problem), TimeoutError)
                reason = f"no answer within {seconds:g} s" if late else str(getattr(problem, "reason", problem))
                reason = reason or type(problem).__name__
            except ValueError as problem:
                reason = f"an answer that is not JSON ({problem})"
        raise UserError(
            f"the endpoint {self.base} did not answer after {attempt + 1} of {self.options.tries} tries ({reason}); "
            "see that the server runs and that the address ends with /v1"
        )

    def _send(self, path: str, body: Mapping[str, Any] | None, seconds: float) -> Any:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.base + path, data, headers)
        with urllib.request.urlopen(request, timeout=seconds) as response:
            return json.loads(response.read())


def data_uri(picture: Image.Image) -> str:
    """Write a picture into an address, as JPEG of quality 95."""
    buffer = io.BytesIO()
    picture.convert("RGB").save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def _word_probabilities(choice: Mapping[str, Any], words: Sequence[str]) -> dict[str, float]:
    """Probabilities of words as the first token; a word in several spellings counts with its likeliest; 0 if absent."""
    found = dict.fromkeys(words, 0.0)
    if words:
        for row in choice["logprobs"]["content"][0]["top_logprobs"]:
            word = str(row["token"]).strip()
            if word in found:
                found[word] = max(found[word], math.exp(row["logprob"]))
    return found
