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

import itertools
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from diffalign.data.vocabulary import TOKEN, Slots, Vocabulary, split_words
from diffalign.diffusion.random import derive_seed
from diffalign.errors import UserError, unknown

Edit = Literal["swap", "replace", "drop", "exchange"]
Rewrite = Callable[[str, random.Random], str]
"""A user's own edit: takes a caption and a random generator, returns another caption."""

_SEPARATORS = frozenset({",", ";", ".", "and"})
_ATTEMPTS = 20
T = TypeVar("T")


@dataclass(frozen=True)
class Mismatch:
    """A caption that does not match.

    Args:
        text: the caption.
        kind: the edit that made it: an :data:`Edit`, the name of the word list that a replacement came from, or "own".
    """

    text: str
    kind: str


@dataclass(frozen=True)
class EditOptions:
    """How captions are edited.

    Args:
        edits: kinds to choose among at random; where none of them applies to a caption it is exchanged for another.
        strength: number of edits, one after the other (DCPO's weak, medium and strong perturbation).
        vocabulary: what may replace what; None to learn it from the captions.
        rewrite: a callable of the user's that takes the place of all rules.
        window: edits show within this many first words: a text encoder with 77 tokens sees nothing beyond.

    Raises:
        UserError: for an unknown edit, or a strength or window below 1.
    """

    edits: tuple[Edit, ...] = ("swap", "replace")
    strength: int = 1
    vocabulary: Vocabulary | None = None
    rewrite: Rewrite | None = None
    window: int = 50

    def __post_init__(self) -> None:
        for edit in self.edits:
            if edit not in get_args(Edit):
                raise unknown("caption edit", edit, get_args(Edit))
        for name in ("strength", "window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} of caption edits is {getattr(self, name)}: expected 1 or more")


def mismatch_captions(prompts: Sequence[str], seed: int, options: EditOptions | None = None) -> list[str]:
    """Return one mismatched caption for each prompt; see :func:`mismatches`, which also tells the kinds."""
    return [mismatch.text for mismatch in mismatches(prompts, seed, options)]


def mismatches(prompts: Sequence[str], seed: int, options: EditOptions | None = None) -> list[Mismatch]:
    """Make one mismatched caption for each prompt, the same for the same seed.

    Args:
        prompts: true captions.
        seed: decides all choices, together with a caption's place and text.
        options: kinds of edits and their number.

    Raises:
        UserError: if a prompt is empty, ``rewrite`` keeps returning the caption, or no rule can change a caption (all
            prompts say the same and none has a word with an alternative).
    """
    options = options or EditOptions()
    for index, prompt in enumerate(prompts):
        if not split_words(prompt):
            raise UserError(f"prompt {index} is empty ({prompt!r}): an empty caption cannot be edited")
    if options.rewrite is not None:
        edit_one = _rewriter(options.rewrite)
    else:
        edit_one = _Rules(prompts, options.vocabulary or Slots(prompts), options)
    return [edit_one(prompt, random.Random(derive_seed(seed, index, prompt))) for index, prompt in enumerate(prompts)]


def same_meaning(first: str, second: str) -> bool:
    """Tell whether captions agree but for case, punctuation and the order of parts joined by "and" or commas."""
    return _canonical(split_words(first)) == _canonical(split_words(second))


def _rewriter(rewrite: Rewrite) -> Callable[[str, random.Random], Mismatch]:
    def edit_one(caption: str, rng: random.Random) -> Mismatch:
        for _ in range(_ATTEMPTS):
            text = rewrite(caption, rng)
            if split_words(text) and not same_meaning(caption, text):
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
    options: EditOptions

    def __call__(self, caption: str, rng: random.Random) -> Mismatch:
        text, kinds = caption, list[str]()
        for _ in range(self.options.strength):
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
        for edit in rng.sample(self.options.edits, len(self.options.edits)):
            if edit == "exchange":
                return self._exchange(caption, rng)
            for candidate in self._candidates(edit, text, rng):
                if self._differs(candidate.text, caption) and self._differs(candidate.text, text):
                    return candidate
        return None

    def _candidates(self, edit: Edit, text: str, rng: random.Random) -> Iterator[Mismatch]:
        """Yield results of one kind of edit in random order; made only as they are asked for, slots can be large."""
        words, vocabulary = split_words(text), self.vocabulary
        seen = range(min(self.options.window, len(words)))
        if edit == "replace":
            for position in _shuffled(seen, rng):
                for word, kind in _shuffled(vocabulary.substitutes(words, position).items(), rng):
                    yield Mismatch(_with_words(text, {position: word}), kind)
        elif edit == "swap":
            for first, second in _shuffled(itertools.combinations(seen, 2), rng):
                if words[first] != words[second] and vocabulary.exchangeable(words[first], words[second]):
                    yield Mismatch(_with_words(text, {first: words[second], second: words[first]}), "swap")
        elif edit == "drop":
            for rest in _shuffled(_without_one_part(text), rng):
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
        shown = [split_words(text)[: self.options.window] for text in (first, second)]
        return _canonical(shown[0]) != _canonical(shown[1])


def _shuffled(values: Iterable[T], rng: random.Random) -> list[T]:
    found = list(values)
    rng.shuffle(found)
    return found


def _with_words(text: str, changes: Mapping[int, str]) -> str:
    """Replace words by position, keep capitals and spacing, and mend "a" or "an" before a changed word."""
    tokens = list(TOKEN.finditer(text))
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
