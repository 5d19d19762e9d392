"""What users get wrong: one message that names source, row and remedy; and the check that finds it beforehand."""

from __future__ import annotations

import json

import pytest

from diffalign.data.check import check_dataset
from diffalign.data.image_source import ImageSource, UnreadableImage
from diffalign.data.load import drop_unreadable, load_examples, with_aspect_buckets
from diffalign.data.readers import SourceOptions
from diffalign.data.schema import Example, ExampleSet, kind_info
from diffalign.errors import UserError
from diffalign.strategies.registry import get_method
from tests.data.support import broken, encoded, pair, source, write_images, write_jsonl


def rows(*winners, prompt="x"):
    return [{"prompt": prompt, "images": [encoded(i), encoded(i + 50)], "winner": w} for i, w in enumerate(winners)]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ([], {}, "it has: no columns at all"),
        (rows(None, None), {}, r"nothing to train on is left \(2 ties dropped\)"),
        (rows(0, 1, prompt=""), {}, r"rows, row 0 \(counted from 0\): prompt is empty"),
        (rows(0, 7), {}, r"rows, row 1 \(counted from 0\): winner is 7"),
        (rows(0), {"column_map": {"prompt": "captoin"}}, "no column 'captoin'"),
        ("no/such/folder", {}, "there is no data set at 'no/such/folder'"),
        ("./missing.jsonl", {}, "there is no data set at './missing.jsonl'"),
        ("bundled", {"data_format": "parqet"}, "unknown data format 'parqet': did you mean 'parquet'"),
    ],
)
def test_mistakes_give_one_message(source, options, message):
    with pytest.raises(UserError, match=message):
        load_examples(source, "pairs", SourceOptions(**options))


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("x.jsonl", "", "is empty: it holds no row"),
        ("x.jsonl", '{"prompt": "a"}\n{"prompt"', "line 2 is not valid JSON"),
        ("x.jsonl", "[1]", "line 1 holds a list; expected an object"),
        ("x.json", '{"a": [\n', "line 1 is not valid JSON"),
        ("x.json", "3", "holds a int; expected a list of rows"),
        ("x.xyz", "", "unknown suffix '.xyz'"),
    ],
)
def test_broken_files_are_named(tmp_path, name, text, message):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        load_examples(path, "pairs")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("x.jsonl", '{"prompt": "a"}\n{"prompt": "café"}\n'),
        ("x.json", '[{"prompt": "a"},\n{"prompt": "café"}]'),
        ("x.csv", "prompt\r\ncafé\r\n"),
        ("x.txt", "a\ncafé\n"),
    ],
)
def test_text_that_is_not_utf8_is_named_with_its_line(tmp_path, name, text):
    (tmp_path / name).write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=rf"{name}, line 2: byte \d+ of the line \(0xe9\) is not UTF-8; save the file"):
        load_examples(tmp_path / name, "prompts")


def test_folders_without_data_are_named(tmp_path):
    with pytest.raises(UserError, match="holds no data: expected images"):
        load_examples(tmp_path, "pairs")
    (tmp_path / "liked").mkdir()
    (tmp_path / "disliked").mkdir()
    with pytest.raises(UserError, match="neither liked nor disliked holds an image"):
        load_examples(tmp_path, "unpaired")


def test_two_annotation_files_ask_which(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        write_jsonl(tmp_path / name, [{"prompt": "x"}])
    with pytest.raises(UserError, match=r"holds a\.jsonl, b\.jsonl: name one of them"):
        load_examples(tmp_path, "prompts")


def test_a_dictionary_of_splits_is_refused():
    import datasets

    splits = datasets.DatasetDict({"train": datasets.Dataset.from_list([{"prompt": "x"}])})
    with pytest.raises(UserError, match="has the splits train: give one of them"):
        load_examples(splits, "prompts")


def test_examples_of_another_kind_are_refused():
    dataset = ExampleSet("pairs", [pair(0)], "mine")
    assert load_examples(dataset, "pairs") is dataset
    with pytest.raises(UserError, match="mine holds pairs, but ranked lists are needed"):
        load_examples(dataset, "ranked_lists")
    with pytest.raises(UserError, match="unknown data kind 'pair': did you mean 'pairs'"):
        kind_info("pair")


def test_unreadable_images_are_dropped_and_counted_or_refused():
    bad = Example("bad", ("x", "x"), (source(1), broken("cut.png")))
    dataset = drop_unreadable(ExampleSet("pairs", [pair(0), bad]))
    assert [e.id for e in dataset.examples] == ["pair-0"]
    assert dataset.notes == {"examples with unreadable images skipped": 1}
    with pytest.raises(UnreadableImage, match=r"cannot decode image 'cut\.png'"):
        drop_unreadable(ExampleSet("pairs", [bad]), strict=True)


def test_one_bucket_for_both_images_of_a_pair():
    bad = Example("bad", ("x",) * 2, (source(92), ImageSource.from_bytes(b"text", "text.png")))
    examples = [Example("wide", ("x", "x"), (source(90, 12, 24), source(91, 12, 22))), pair(0), bad]
    dataset = with_aspect_buckets(ExampleSet("pairs", examples), (64, 64))
    height, width = dataset.examples[0].size
    assert width > height
    assert dataset.examples[1].size == (64, 64)
    assert dataset.examples[2].size is None
    assert dataset.examples[0].group != dataset.examples[1].group


def test_the_check_names_the_first_bad_row_and_image(tmp_path):
    write_images(tmp_path, [f"{i}.png" for i in range(6)])
    (tmp_path / "3.png").write_bytes(encoded(3)[:50])
    path = write_jsonl(
        tmp_path / "pairs.jsonl",
        [
            {"prompt": "x", "images": ["0.png", "1.png"], "winner": 0},
            {"prompt": "x", "images": ["2.png", "3.png"], "winner": 1},
            {"prompt": "x", "images": ["4.png", "5.png"], "winner": 5},
            {"prompt": "", "images": ["4.png", "5.png"], "winner": 1},
            {"prompt": "x", "images": ["4.png", "5.png"], "winner": None},
        ],
    )
    report = check_dataset(path, "pairs")
    assert not report.ok
    assert (report.rows, report.examples, report.bad_rows, report.unreadable) == (5, 1, 2, 1)
    assert report.first_bad_row.startswith("pairs.jsonl, line 3: winner is 5")
    assert "3.png" in report.first_unreadable
    assert report.notes == {"ties dropped": 1, "examples with unreadable images skipped": 1}
    assert report.image_sizes == {(12, 12): 5}
    lines = "\n".join(report.lines())
    assert "pairs.jsonl: not usable as pairs" in lines
    assert "rows: 5; examples: 1; 1 ties dropped; 1 examples with unreadable images skipped" in lines


def test_the_check_does_not_say_that_nothing_is_left_out_above_faults(tmp_path):
    write_images(tmp_path, ["0.png", "1.png", "2.png"])
    (tmp_path / "2.png").write_bytes(b"no picture")
    # only the best and the worst of a list make the pair: the unreadable one costs no example
    row = {"prompt": "x", "images": ["0.png", "1.png", "2.png"], "scores": [2, 0, 1]}
    report = check_dataset(write_jsonl(tmp_path / "pairs.jsonl", [row]), "pairs")
    assert (report.examples, report.unreadable, report.notes) == (1, 1, {})
    assert "nothing left out" not in "\n".join(report.lines())
    report = check_dataset(write_jsonl(tmp_path / "pairs.jsonl", [{**row, "scores": [2, 0]}]), "pairs")
    assert "nothing left out" not in "\n".join(report.lines())
    assert "nothing left out" in "\n".join(check_dataset(rows(0), "pairs").lines())


def test_rows_are_named_by_the_lines_of_their_file(tmp_path):
    write_images(tmp_path, ["0.png", "1.png"])
    bad = {"prompt": "", "images": ["0.png", "1.png"], "winner": 0}
    good = {**bad, "prompt": "x"}
    (tmp_path / "a.jsonl").write_text(f"\n{json.dumps(good)}\n\n{json.dumps(bad)}\n")
    (tmp_path / "b.csv").write_text('prompt,image_0,image_1,winner\n"two\nlines",0.png,1.png,0\n\n ,0.png,1.png,1\n')
    (tmp_path / "c.json").write_text(json.dumps([good, bad]))
    places = {"a.jsonl": "a.jsonl, line 4", "b.csv": "b.csv, line 5", "c.json": "c.json, row 1 (counted from 0)"}
    for name, place in places.items():
        report = check_dataset(tmp_path / name, "pairs")
        assert report.first_bad_row.startswith(f"{place}: prompt is empty"), report.first_bad_row
    (tmp_path / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in (good, bad)))
    with pytest.raises(UserError, match=r"metadata\.jsonl, line 2: prompt is empty"):
        load_examples(tmp_path, "pairs", SourceOptions(data_format="image_folder"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "x", "images": ["0.png"], "winner": 0}))
    report = check_dataset(tmp_path / "a.jsonl", "pairs")
    assert report.first_bad_row.startswith("a.jsonl, line 1: record 'row-0' has 1 image(s)")


def test_liked_pictures_alone(tmp_path):
    write_images(tmp_path, ["liked/0.png"])
    options = SourceOptions(default_prompt="a cat")
    assert get_method("sft").strategy.spec.data == "winners"
    assert len(load_examples(tmp_path, "winners", options)) == 1
    for kind in ("pairs", "unpaired"):
        with pytest.raises(UserError, match=rf"no folder 'disliked' beside it, and {kind} need both: .*such as sft"):
            check_dataset(tmp_path, kind, options)
    (tmp_path / "liked").rename(tmp_path / "disliked")
    with pytest.raises(UserError, match="no folder 'liked' beside it: no method learns from disliked pictures alone"):
        load_examples(tmp_path, "winners", options)
    assert len(load_examples(tmp_path, "prompts", options)) == 1


def test_the_check_accepts_good_data_and_refuses_ties_throughout():
    assert check_dataset(rows(0, 1), "pairs").ok
    assert check_dataset([*rows(0, 1), *rows(0, prompt="a y")], "mismatched_captions").bad_rows == 0
    assert not check_dataset(rows(None), "pairs").ok
