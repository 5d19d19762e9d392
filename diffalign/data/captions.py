"""Captions that do not fit their image: small edits of true captions.

Text preference optimisation (arXiv 2509.25771) and dual captions (DCPO, arXiv 2502.06023) learn from a caption beside
a slightly wrong one. The papers had a large language model or a paraphraser write them. The rules here need no model:
what may replace what is either learned from the captions themselves (words that occur in the same slot, between the
same neighbours) or given as word lists. A callable of one's own takes their place where better edits are at hand.

Edits:

- ``swap``: two exchangeable words of the caption change places ("a red circle and a blue star" -> "a blue circle ...").
- ``replace``: one word becomes another of the same slot ("two circles" -> "three circles").
- ``drop``: one of several parts joined by commas or "and" goes. The rest stays true of the image, so it is the mildest.
- ``exchange``: another caption of the set; easy to tell apart, the last resort when no other edit applies.

Articles, "and", "of" and the like are never edited, and no edit returns a caption that says the same: one with the
parts around an "and" merely in another order is refused.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, get_args

from diffalign.diffusion.random import derive_seed
from diffalign.errors import UserError, unknown

Edit = Literal["swap", "replace", "drop", "exchange"]
Rewrite = Callable[[str, random.Random], str]
"""A user's own edit: takes a caption and a random generator, returns another caption."""

FUNCTION_WORDS = frozenset(
    ["a", "an", "the", "and", "or", "of", "is", "are", "was", "were", "be", "it", "its", "this", "that", "to", "with"]
)
_SEPARATORS = frozenset({",", ";", ".", "and"})
_TOKEN = re.compile(r"\w+(?:['’-]\w+)*|[^\w\s]")
_ATTEMPTS = 20


@dataclass(frozen=True)
class Mismatch:
    """A caption that does not match.

    Args:
        text: the caption.
        kind: the edit that made it: an :data:`Edit`, the name of the word list that a replacement came from, or "own".
    """

    text: str
    kind: str


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
            words = _words(caption)
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


def mismatch_captions(
    prompts: Sequence[str],
    seed: int,
    *,
    edits: Sequence[Edit] = ("swap", "replace"),
    strength: int = 1,
    vocabulary: Vocabulary | None = None,
    rewrite: Rewrite | None = None,
    window: int = 50,
) -> list[str]:
    """Return one mismatched caption for each prompt; see :func:`mismatches`, which also tells the kinds."""
    found = mismatches(
        prompts, seed, edits=edits, strength=strength, vocabulary=vocabulary, rewrite=rewrite, window=window
    )
    return [mismatch.text for mismatch in found]


def mismatches(
    prompts: Sequence[str],
    seed: int,
    *,
    edits: Sequence[Edit] = ("swap", "replace"),
    strength: int = 1,
    vocabulary: Vocabulary | None = None,
    rewrite: Rewrite | None = None,
    window: int = 50,
) -> list[Mismatch]:
    """Make one mismatched caption for each prompt, the same for the same seed.

    Args:
        prompts: true captions.
        seed: decides all choices, together with a caption's place and text.
        edits: kinds to choose among at random; where none of them applies to a caption it is exchanged for another.
        strength: number of edits, one after the other (DCPO's weak, medium and strong perturbation).
        vocabulary: what may replace what; by default learned from the prompts.
        rewrite: a callable of the user's that takes the place of all rules.
        window: edits show within this many first words: a text encoder with 77 tokens sees nothing beyond.

    Raises:
        UserError: if an edit is unknown, a prompt is empty, ``rewrite`` keeps returning the caption, or no rule can
            change a caption (all prompts say the same and none has a word with an alternative).
    """
    for edit in edits:
        if edit not in get_args(Edit):
            raise unknown("caption edit", edit, get_args(Edit))
    if strength < 1:
        raise UserError(f"strength is {strength}; at least one edit is needed")
    for index, prompt in enumerate(prompts):
        if not _words(prompt):
            raise UserError(f"prompt {index} is empty ({prompt!r}): an empty caption cannot be edited")
    if rewrite is not None:
        edit_one = _rewriter(rewrite)
    else:
        edit_one = _Rules(prompts, vocabulary or Slots(prompts), tuple(edits), strength, window)
    return [edit_one(prompt, random.Random(derive_seed(seed, index, prompt))) for index, prompt in enumerate(prompts)]


def same_meaning(first: str, second: str) -> bool:
    """Tell whether captions agree but for case, punctuation and the order of parts joined by "and" or commas."""
    return _canonical(_words(first)) == _canonical(_words(second))


def _rewriter(rewrite: Rewrite) -> Callable[[str, random.Random], Mismatch]:
    def edit_one(caption: str, rng: random.Random) -> Mismatch:
        for _ in range(_ATTEMPTS):
            text = rewrite(caption, rng)
            if _words(text) and not same_meaning(caption, text):
                return Mismatch(text, "own")
        raise UserError(
            f"the caption edit returned the caption itself, or nothing, {_ATTEMPTS} times for {caption!r}; "
            "it must return a caption that differs"
        )

    return edit_one


@dataclass(frozen=True)
class _Rules:
    """Rule-based edits of one caption, given all captions."""

    captions: Sequence[str]
    vocabulary: Vocabulary
    edits: tuple[Edit, ...]
    strength: int
    window: int

    def __call__(self, caption: str, rng: random.Random) -> Mismatch:
        text, kinds = caption, list[str]()
        for _ in range(self.strength):
            mismatch = self._once(text, caption, rng)
            if mismatch is None:
                break
            text = mismatch.text
            kinds.append(mismatch.kind)
        if kinds:
            return Mismatch(text, "+".join(dict.fromkeys(kinds)))
        return self._exchange(caption, rng)

    def _once(self, text: str, caption: str, rng: random.Random) -> Mismatch | None:
        """Apply one edit of a random kind; None when no kind gives a caption that differs from the true one."""
        for edit in rng.sample(self.edits, len(self.edits)):
            if edit == "exchange":
                return self._exchange(caption, rng)
            candidates = list(self._candidates(edit, text))
            rng.shuffle(candidates)
            for candidate in candidates:
                if self._differs(candidate.text, caption) and self._differs(candidate.text, text):
                    return candidate
        return None

    def _candidates(self, edit: Edit, text: str) -> Iterator[Mismatch]:
        words, seen = _words(text), min(self.window, len(_words(text)))
        if edit == "replace":
            for position in range(seen):
                for word, kind in self.vocabulary.substitutes(words, position).items():
                    yield Mismatch(_with_words(text, {position: word}), kind)
        elif edit == "swap":
            for second in range(seen):
                for first in range(second):
                    if words[first] != words[second] and self.vocabulary.exchangeable(words[first], words[second]):
                        yield Mismatch(_with_words(text, {first: words[second], second: words[first]}), "swap")
        elif edit == "drop":
            for rest in _without_one_part(text):
                yield Mismatch(rest, "drop")

    def _exchange(self, caption: str, rng: random.Random) -> Mismatch:
        for _ in range(_ATTEMPTS):
            other = self.captions[rng.randrange(len(self.captions))]
            if self._differs(other, caption):
                return Mismatch(other, "exchange")
        others = sorted({other for other in self.captions if self._differs(other, caption)})
        if not others:
            raise UserError(
                f"no caption can be made that mismatches {caption!r}: no word of it has an alternative and all "
                f"{len(self.captions)} captions say the same; give word lists, a caption edit of your own, or a column"
            )
        return Mismatch(rng.choice(others), "exchange")

    def _differs(self, first: str, second: str) -> bool:
        shown = [_words(text)[: self.window] for text in (first, second)]
        return _canonical(shown[0]) != _canonical(shown[1])


def _words(text: str) -> list[str]:
    return [token.lower() for token in _TOKEN.findall(text)]


def _contexts(words: Sequence[str], position: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the wider and the narrower slot of a position; "an" counts as "a", the edges of the caption as words."""
    padded = ["<", "<", *("a" if word == "an" else word for word in words), ">"]
    before, last, after = padded[position], padded[position + 1], padded[position + 3]
    return (before, last, after), (last, after)


def _with_words(text: str, changes: Mapping[int, str]) -> str:
    """Replace words by position, keep capitals and spacing, and mend "a" or "an" before a changed word."""
    tokens = list(_TOKEN.finditer(text))
    changes = dict(changes)
    for position in list(changes):
        if position and tokens[position - 1].group().lower() in ("a", "an"):
            changes[position - 1] = "an" if changes[position][0] in "aeiou" else "a"
    parts, end = list[str](), 0
    for position, token in enumerate(tokens):
        word = changes.get(position, token.group())
        parts += [text[end : token.start()], word.capitalize() if token.group()[0].isupper() else word]
        end = token.end()
    return "".join([*parts, text[end:]])


def _parts(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Split words at commas and "and", without the separators."""
    parts: list[list[str]] = [[]]
    for word in words:
        if word in _SEPARATORS:
            parts.append([])
        else:
            parts[-1].append(word)
    return [tuple(part) for part in parts if part]


def _without_one_part(text: str) -> Iterator[str]:
    """Yield the caption without one of its parts; what leads into the first part ("a photo of") stays."""
    pieces = [piece for piece in re.split(r"\s*[,;.]\s*(?:and\s+)?|\s+and\s+", text.strip(), flags=re.I) if piece]
    for dropped in range(len(pieces) - 1, 0, -1):
        kept = pieces[:dropped] + pieces[dropped + 1 :]
        yield kept[0] if len(kept) == 1 else ", ".join(kept[:-1]) + " and " + kept[-1]


def _canonical(words: Sequence[str]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Return words in a form that ignores the order of joined parts.

    In "a photo of a circle and a star" the parts joined are "a circle" and "a star": as many words before the "and" as
    follow it; what precedes them ("a photo of") is apart.
    """
    parts = _parts(["a" if word == "an" else word for word in words if word[0].isalnum() or word in _SEPARATORS])
    if len(parts) < 2:
        return (), parts
    cut = max(0, len(parts[0]) - len(parts[1]))
    return parts[0][:cut], sorted([parts[0][cut:], *parts[1:]])
