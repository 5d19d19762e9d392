"""Preference data of text: rows in the formats that TRL reads, as examples.

A row is one of

- explicit prompt: ``prompt``, ``chosen``, ``rejected``;
- implicit prompt: ``chosen``, ``rejected`` alone; the prompt is what they have in common at their start;

each a string (*standard*), or a list of ``{"role", "content"}`` messages (*conversational*). Further numeric columns
become fields; ``score_chosen`` and ``score_rejected`` also become the field ``scores``, (B, 2).
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from diffalign.bundled import bundled_path
from diffalign.data.fields import with_complete_fields
from diffalign.data.readers import BUNDLED, SourceOptions, open_table
from diffalign.data.rows import apply_column_map
from diffalign.data.schema import ExampleSet, Numbers
from diffalign.data.table import Table
from diffalign.errors import UserError, nearest

BUNDLED_PREFERENCES = "writer-preferences"
Message = Mapping[str, str]
Text = str | tuple[Message, ...]
"""Plain text, or the messages of a conversation."""
_OWN = frozenset({"id", "prompt", "chosen", "rejected"})
_SCORES = ("score_chosen", "score_rejected")


@dataclass(frozen=True, slots=True)
class TextExample:
    """A prompt with its completions.

    Args:
        id: stable and unique in the data set; seeds and caches derive from it.
        prompt: what is completed.
        completions: chosen before rejected.
        fields: numbers that reach the strategy as ``Batch.fields``.
    """

    id: str
    prompt: Text
    completions: tuple[Text, ...]
    fields: Mapping[str, Numbers] = field(default_factory=dict)

    @property
    def group(self) -> int:
        """Examples with as many completions fit into one batch."""
        return len(self.completions)

    @property
    def shown_prompt(self) -> str:
        """The prompt as plain text, for people."""
        if isinstance(self.prompt, str):
            return self.prompt
        return "\n".join(f"{message['role']}: {message['content']}" for message in self.prompt)


@dataclass(frozen=True)
class TextSet(ExampleSet[TextExample]):
    """All examples of a data set of text.

    Args:
        bundled: these are the bundled writer's preferences, for which an exact reward exists.
    """

    bundled: bool = False


def load_text_pairs(source: Any, options: SourceOptions | None = None) -> TextSet:
    """Load pairs of completions.

    Args:
        source: "bundled", a file (jsonl, json, csv, parquet) or folder, a hub name, a ``datasets`` object, a list of
            rows, or a :class:`TextSet`, which is returned as it is.
        options: split, columns, number of examples.

    Returns:
        the examples, with counts of what was left out: pairs whose two completions are the same.

    Raises:
        UserError: one message that names source, row and column, what is there and what was expected.
    """
    if isinstance(source, TextSet):
        return source
    options = options or SourceOptions()
    if options.streaming:
        raise UserError("streams of text are not supported: leave --streaming out, preference data fit in memory")
    bundled = isinstance(source, str) and source == BUNDLED
    table = _open(bundled_path(BUNDLED_PREFERENCES) if bundled else source, options)
    columns = set(apply_column_map(dict.fromkeys(table.columns), options.column_map))
    _require(columns, table, options.column_map)
    notes: Counter[str] = Counter()
    rows = (apply_column_map(row, options.column_map) for row in table.rows())
    found = (_example(row, index, table, notes) for index, row in enumerate(rows))
    kept = list(itertools.islice((e for e in found if e is not None), options.max_samples or None))
    examples = with_complete_fields(kept, notes)
    empty = TextSet("pairs", (), BUNDLED_PREFERENCES if bundled else table.name, bundled=bundled)
    return empty.with_examples(examples, notes)


def common_prompt(chosen: Text, rejected: Text) -> tuple[Text, Text, Text]:
    """Split two whole texts, or conversations, into what they share at their start and the two rests.

    Plain text is divided at the last white space that both share, so that no word is torn; the white space belongs to
    the completions.

    Raises:
        UserError: if one is plain text and the other a conversation, or they share nothing.
    """
    if isinstance(chosen, str) and isinstance(rejected, str):
        shared = sum(
            1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(chosen, rejected, strict=False))
        )
        while shared and not (chosen[shared : shared + 1].isspace() and rejected[shared : shared + 1].isspace()):
            shared -= 1
        if not shared:
            raise UserError("chosen and rejected share no beginning that could be their prompt: add a column 'prompt'")
        return chosen[:shared], chosen[shared:], rejected[shared:]
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise UserError("one of chosen and rejected is plain text, the other a conversation; expected the same form")
    pairs = zip(chosen, rejected, strict=False)
    shared = sum(1 for _ in itertools.takewhile(lambda pair: dict(pair[0]) == dict(pair[1]), pairs))
    if not shared:
        raise UserError("chosen and rejected share no message that could be their prompt: add a column 'prompt'")
    return chosen[:shared], chosen[shared:], rejected[shared:]


def _open(source: Any, options: SourceOptions) -> Table:
    table = open_table(source, "pairs", options)
    if table.streams:
        raise UserError(f"{table.name} is a stream, which text does not support: give a data set in memory")
    return table


def _require(columns: set[str], table: Table, column_map: Mapping[str, str]) -> None:
    for name, own in column_map.items():
        if own not in table.columns:
            raise UserError(
                f"--column_map {name}={own}: {table.name} has no column {own!r} - {nearest(own, table.columns)}"
            )
    missing = [name for name in ("chosen", "rejected") if name not in columns]
    if missing:
        raise UserError(
            f"{table.name} has no column {missing[0]!r}; it has: {', '.join(sorted(table.columns)) or 'none'}. Pairs "
            "of text need chosen, rejected and mostly prompt; name the column that holds it with "
            f'--column_map \'{{"{missing[0]}": "COLUMN"}}\''
        )


def _example(row: Mapping[str, Any], index: int, table: Table, notes: Counter[str]) -> TextExample | None:
    try:
        chosen, rejected = _text(row["chosen"], "chosen"), _text(row["rejected"], "rejected")
        if chosen == rejected:
            notes["pairs of equal completions dropped"] += 1
            return None
        if row.get("prompt") is None:
            prompt, chosen, rejected = common_prompt(chosen, rejected)
        else:
            prompt = _text(row["prompt"], "prompt")
        if len({isinstance(value, str) for value in (prompt, chosen, rejected)}) > 1:
            raise UserError("prompt, chosen and rejected mix plain text and conversations; expected the same form")
        for name, value in (("chosen", chosen), ("rejected", rejected)):
            if not value:
                raise UserError(f"{name} has no completion after the prompt that both share")
    except UserError as error:
        raise UserError(f"{table.where(index)}: {error}") from None
    identity = str(row["id"]) if row.get("id") is not None else f"row-{index}"
    return TextExample(identity, prompt, (chosen, rejected), _fields(row))


def _text(value: Any, name: str) -> Text:
    if isinstance(value, str):
        if not value.strip():
            raise UserError(f"{name} is empty ({value!r}); expected text")
        return value
    if isinstance(value, Sequence) and value and all(_is_message(message) for message in value):
        return tuple({"role": message["role"], "content": message["content"]} for message in value)
    raise UserError(
        f"{name} is {str(value)[:80]!r} of type {type(value).__name__}; expected text, or a list of messages "
        '{"role": ..., "content": ...}'
    )


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(value.get(key), str) for key in ("role", "content"))


def _fields(row: Mapping[str, Any]) -> dict[str, Numbers]:
    fields: dict[str, Numbers] = {
        name: float(value) for name, value in row.items() if name not in _OWN and isinstance(value, int | float)
    }
    if all(name in fields for name in _SCORES):
        fields["scores"] = tuple(float(row[name]) for name in _SCORES)
    return fields
