"""Rows to examples to batches: formats, masks, and messages for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from diffalign.batch import TextBatch
from diffalign.data.loader import ExampleLoader, LoaderOptions, MicroBatch
from diffalign.data.readers import SourceOptions
from diffalign.errors import UserError
from diffalign.text.data import TextExample, common_prompt, load_text_pairs
from diffalign.text.encode import TextEncoder
from diffalign.text.policy import TextPolicy
from tests.text.models import tiny_text_policy

ROWS = [
    {
        "prompt": "hi :",
        "chosen": "a cat",
        "rejected": "the dog and the cat",
        "score_chosen": 1.0,
        "score_rejected": 0.25,
    },
    {
        "prompt": "a red star :",
        "chosen": "a photo of a red star",
        "rejected": "a",
        "score_chosen": 1,
        "score_rejected": 0,
    },
]


def says(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def encode(policy: TextPolicy, *examples: TextExample, max_length: int = 0) -> TextBatch:
    return TextEncoder(policy, max_length)(MicroBatch(examples, torch.arange(len(examples))))


def words(policy: TextPolicy, batch: TextBatch, row: int) -> tuple[str, str]:
    """What a row's tokens say: all of them, and the completion's."""
    tokens = policy.tokenizer.convert_ids_to_tokens(batch.input_ids[row].tolist())
    real = [t for t, kept in zip(tokens, batch.attention_mask[row].tolist(), strict=True) if kept]
    own = [t for t, kept in zip(tokens, batch.completion_mask[row].tolist(), strict=True) if kept]
    return " ".join(real), " ".join(own)


@pytest.mark.parametrize("suffix", ["jsonl", "json", "csv", "parquet", "rows"])
def test_all_sources_give_the_same_examples(suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f"pairs.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    elif suffix == "json":
        path.write_text(json.dumps(ROWS))
    elif suffix == "csv":
        lines = [",".join(ROWS[0]), *(",".join(str(value) for value in row.values()) for row in ROWS)]
        path.write_text("\n".join(lines) + "\n")
    elif suffix == "parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(ROWS), path)
    dataset = load_text_pairs(ROWS if suffix == "rows" else path)
    assert [example.completions for example in dataset] == [(row["chosen"], row["rejected"]) for row in ROWS]
    assert [example.prompt for example in dataset] == ["hi :", "a red star :"]
    if suffix != "csv":
        assert dataset.examples[0].fields["scores"] == (1.0, 0.25)


def test_masks_are_exact() -> None:
    policy = tiny_text_policy(adapter=False)
    batch = encode(policy, *load_text_pairs(ROWS).examples)
    assert words(policy, batch, 0) == ("hi : a cat <eos>", "a cat <eos>")
    assert words(policy, batch, 1) == ("a red star : a photo of a red star <eos>", "a photo of a red star <eos>")
    assert words(policy, batch, 2)[1] == "the dog and the cat <eos>"
    assert batch.input_ids.shape == (4, 11)
    assert (batch.attention_mask.diff(dim=1) <= 0).all()  # padding stands on the right
    assert batch.fields["scores"].tolist() == [[1.0, 0.25], [1.0, 0.0]]
    assert batch.cache_keys == ["row-0", "row-1"]


def test_a_row_without_numbers_has_gaps_in_its_batch() -> None:
    policy = tiny_text_policy(adapter=False)
    bare = {name: text for name, text in ROWS[1].items() if not name.startswith("score")}
    scores = encode(policy, *load_text_pairs([ROWS[0], bare]).examples).fields["scores"]
    assert scores[0].tolist() == [1.0, 0.25]
    assert scores[1].isnan().all()


def test_an_end_of_sequence_that_is_written_is_not_doubled() -> None:
    policy = tiny_text_policy(adapter=False)
    batch = encode(policy, TextExample("x", "hi :", ("a cat <eos>", "a dog")))
    assert words(policy, batch, 0)[1] == "a cat <eos>"


def test_conversations_go_through_the_chat_template() -> None:
    policy = tiny_text_policy(adapter=False)
    prompt, good, bad = says("user", "hi"), says("assistant", "a cat"), says("assistant", "the dog")
    explicit = [{"prompt": [prompt], "chosen": [good], "rejected": [bad]}]
    implicit = [{"chosen": [prompt, good], "rejected": [prompt, bad]}]
    batches = [encode(policy, *load_text_pairs(rows).examples) for rows in (explicit, implicit)]
    assert words(policy, batches[0], 0) == ("user hi <eos> assistant a cat <eos>", "a cat <eos>")
    assert words(policy, batches[0], 1)[1] == "the dog <eos>"
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    assert torch.equal(batches[0].completion_mask, batches[1].completion_mask)


def test_implicit_prompts_of_plain_text_end_between_words() -> None:
    assert common_prompt("Q: hi A: cats", "Q: hi A: cows") == ("Q: hi A:", " cats", " cows")
    assert common_prompt("Q: hi there", "Q: hi there friend") == ("Q: hi", " there", " there friend")
    with pytest.raises(UserError, match="share no beginning"):
        common_prompt("yes", "yesterday")


def test_a_long_prompt_loses_its_beginning_and_a_long_completion_its_example() -> None:
    policy = tiny_text_policy(adapter=False)
    long = TextExample("long", "cat on the mat and the dog :", ("a cat", "hi"))
    batch = encode(policy, long, max_length=6)
    assert words(policy, batch, 0) == ("the dog : a cat <eos>", "a cat <eos>")
    encoder = TextEncoder(policy, max_length=6)
    rows = [{"id": "long", "prompt": "hi :", "chosen": "a " * 9, "rejected": "hi"}, {**ROWS[0], "rejected": "the dog"}]
    dataset = encoder.precompute(load_text_pairs(rows))
    assert [example.id for example in dataset] == ["row-1"]
    assert dataset.notes["completions longer than 6 tokens dropped"] == 1
    with pytest.raises(UserError, match="nothing to train on is left"):
        encoder.precompute(load_text_pairs(rows[:1]))


def test_an_empty_prompt_is_replaced_by_the_start_of_sequence() -> None:
    policy = tiny_text_policy(adapter=False)
    batch = encode(policy, TextExample("x", "", ("a cat", "hi")))
    assert words(policy, batch, 0) == ("<bos> a cat <eos>", "a cat <eos>")


def test_the_loader_of_images_takes_text_as_it_is() -> None:
    policy = tiny_text_policy(adapter=False)
    rows = [{"prompt": "hi :", "chosen": f"a {word}", "rejected": "the"} for word in ("cat", "dog", "mat")]
    encoder = TextEncoder(policy)
    dataset = encoder.precompute(load_text_pairs(rows))
    loader = ExampleLoader(dataset.examples, LoaderOptions(micro_batch=2, accumulation=1))
    steps = iter(loader)
    ids = [name for _ in range(2) for micro in next(steps) for name in encoder(micro).ids]
    assert sorted(ids) == ["row-0", "row-1", "row-2"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "hi", "chosen": "a", "better": "b"}], "has no column 'rejected'.*--column_map"),
        ([{"prompt": "hi", "chosen": "a", "rejected": " "}], r"row 0 \(counted from 0\): rejected is empty"),
        ([{"prompt": "hi", "chosen": "a", "rejected": 3}], r"row 0 \(counted from 0\): rejected is '3' of type int"),
        ([{"prompt": "hi", "chosen": "a", "rejected": [{"role": "user"}]}], "list of messages"),
        ([{"prompt": "hi", "chosen": "a", "rejected": "a"}], "pairs of equal completions dropped"),
        ([{"prompt": "hi", "chosen": "a", "rejected": [says("user", "x")]}], "mix plain text and conversations"),
        ([{"chosen": "a", "rejected": "b"}], r"row 0 \(counted from 0\): chosen and rejected share no beginning"),
    ],
)
def test_bad_rows_are_named(rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_text_pairs(rows)


def test_columns_are_mapped() -> None:
    rows = [{"question": "hi :", "good": "a cat", "bad": "a dog"}]
    mapped = SourceOptions(column_map={"prompt": "question", "chosen": "good", "rejected": "bad"})
    assert load_text_pairs(rows, mapped).examples[0].completions == ("a cat", "a dog")
    with pytest.raises(UserError, match="has no column 'gud'"):
        load_text_pairs(rows, SourceOptions(column_map={"chosen": "gud"}))
