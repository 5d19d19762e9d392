"""Which words of a caption may stand in for which: learned from captions, or given as lists."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Protocol

from diffalign.errors import UserError

TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
"""A word, with inner hyphens and apostrophes, or a punctuation mark."""
FUNCTION_WORDS = frozenset(
    ["a", "an", "the", "and", "or", "of", "is", "are", "was", "were", "be", "it", "its", "this", "that", "to", "with"]
)
"""English words that carry no picture; never edited."""


def split_words(text: str) -> list[str]:
    """Return the words and punctuation marks of a caption in small letters."""
    return [token.lower() for token in TOKEN.findall(text)]


class Vocabulary(Protocol):
    """Knows which words may stand in for which."""

    def substitutes(self, words: Sequence[str], position: int) -> Mapping[str, str]:
        """Words that may replace the one at ``position``, each with the kind of edit it makes; sorted."""
        ...

    def exchangeable(self, first: str, second: str) -> bool:
        """Whether two words belong to one class."""
        ...


class Slots:
    """A vocabulary learned from captions: words found between the same neighbours are of one class.

    The wider context (two words before, one after) is asked first, because it keeps number and article in agreement.

    Args:
        captions: the captions to learn from.
        keep: words that are never edited.
    """

    def __init__(self, captions: Sequence[str], keep: frozenset[str] = FUNCTION_WORDS) -> None:
        self._keep = keep
        self._words: dict[tuple[str, ...], set[str]] = defaultdict(set)
        self._slots: dict[str, set[tuple[str, ...]]] = defaultdict(set)
        for caption in dict.fromkeys(captions):
            words = split_words(caption)
            for position, word in enumerate(words):
                if not self._editable(word):
                    continue
                wide, narrow = _contexts(words, position)
                self._words[wide].add(word)
                self._words[narrow].add(word)
                self._slots[word].add(narrow)

    def substitutes(self, words: Sequence[str], position: int) -> Mapping[str, str]:
        """See :class:`Vocabulary`."""
        if not self._editable(words[position]):
            return {}
        for context in _contexts(words, position):
            found = self._words.get(context, set()) - {words[position]}
            if found:
                return dict.fromkeys(sorted(found), "replace")
        return {}

    def exchangeable(self, first: str, second: str) -> bool:
        """See :class:`Vocabulary`."""
        return not self._slots.get(first, set()).isdisjoint(self._slots.get(second, set()))

    def _editable(self, word: str) -> bool:
        return word not in self._keep and (word[0].isalnum())


class WordLists:
    """A vocabulary given by the caller.

    Args:
        lists: kind of edit -> the words of that class, for example ``{"colour": ["red", "blue"]}``.

    Raises:
        UserError: if a list has fewer than two words.
    """

    def __init__(self, lists: Mapping[str, Sequence[str]]) -> None:
        self._lists = {kind: sorted({word.lower() for word in words}) for kind, words in lists.items()}
        for kind, words in self._lists.items():
            if len(words) < 2:
                raise UserError(f"word list {kind!r} has {len(words)} word(s); an edit needs at least two")

    def substitutes(self, words: Sequence[str], position: int) -> Mapping[str, str]:
        """See :class:`Vocabulary`."""
        found = {word: kind for kind, members in self._lists.items() if words[position] in members for word in members}
        found.pop(words[position], None)
        return dict(sorted(found.items()))

    def exchangeable(self, first: str, second: str) -> bool:
        """See :class:`Vocabulary`."""
        return any(first in members and second in members for members in self._lists.values())


def _contexts(words: Sequence[str], position: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the wider and the narrower slot of a position; "an" counts as "a", the edges of the caption as words."""
    padded = ["<", "<", *("a" if word == "an" else word for word in words), ">"]
    before, last, after = padded[position], padded[position + 1], padded[position + 3]
    return (before, last, after), (last, after)
