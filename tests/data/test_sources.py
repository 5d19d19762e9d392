"""Every kind of source gives the same examples; every published layout loads as it is."""

from __future__ import annotations

import io
import json
import tarfile

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffalign.bundled import bundled_path
from diffalign.data.load import load_examples
from diffalign.data.pairing import PairingOptions
from diffalign.data.readers import SourceOptions, detect_format
from diffalign.data.schema import ExampleSet, StreamSet
from diffalign.errors import UserError
from diffalign.world.grammar import prompts
from diffalign.world.verifier import verify
from tests.data.support import encoded, picture, write_images, write_jsonl

ROWS = [("a red cat", 0), ("a blue dog", 1), ("a green bird", None)]
"""Caption and winner of the rows that every source below holds; the last one is a tie."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("datasets-cache")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


def images_of(row: int) -> list[bytes]:
    return [encoded(2 * row), encoded(2 * row + 1)]


def table_rows() -> list[dict]:
    return [
        {"prompt": prompt, "images": [{"bytes": data, "path": None} for data in images_of(row)], "winner": winner}
        for row, (prompt, winner) in enumerate(ROWS)
    ]


def as_dataset() -> datasets.Dataset:
    features = datasets.Features(
        {
            "prompt": datasets.Value("string"),
            "images": datasets.List(datasets.Image()),
            "winner": datasets.Value("int64"),
        }
    )
    return datasets.Dataset.from_list(table_rows(), features=features)


def pickapic_rows() -> list[dict]:
    labels = {0: 1.0, 1: 0.0, None: 0.5}
    return [
        {
            "are_different": True, "best_image_uid": "u", "caption": prompt, "has_label": True, "image_0_uid": "i",
            "image_0_url": "", "jpg_0": images_of(row)[0], "jpg_1": images_of(row)[1], "label_0": labels[winner],
            "label_1": 1 - labels[winner], "model_0": "m", "model_1": "m", "ranking_id": row, "user_id": 7,
        }
        for row, (prompt, winner) in enumerate(ROWS)
    ]  # fmt: skip


def assert_the_pairs(dataset: ExampleSet) -> None:
    expected = [(ROWS[0][0], encoded(0), encoded(1)), (ROWS[1][0], encoded(3), encoded(2))]
    found = [(e.prompts[0], *(image.read() for image in e.images)) for e in dataset.examples]
    assert sorted(found) == sorted(expected)
    assert dataset.notes == {"ties dropped": 1}
    assert len({image.name for e in dataset.examples for image in e.images}) == 4


def write_pairs(folder, name="pairs.jsonl"):
    write_images(folder, [f"{row}-{side}.png" for row in range(3) for side in "ab"])
    rows = [{"prompt": p, "images": [f"{row}-a.png", f"{row}-b.png"], "winner": w} for row, (p, w) in enumerate(ROWS)]
    return write_jsonl(folder / name, rows)


def test_rows_and_datasets_in_memory():
    assert_the_pairs(load_examples(table_rows(), "pairs"))
    assert_the_pairs(load_examples(as_dataset(), "pairs"))
    assert_the_pairs(load_examples(as_dataset().select([2, 1, 0]), "pairs"))


def test_annotation_files(tmp_path):
    path = write_pairs(tmp_path)
    assert_the_pairs(load_examples(path, "pairs"))
    assert_the_pairs(load_examples(str(tmp_path), "pairs"))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    assert_the_pairs(load_examples(tmp_path / "pairs.json", "pairs"))
    lines = ["caption,chosen,rejected"]
    lines += [f"{p},{r}-{'ab'[w]}.png,{r}-{'ba'[w]}.png" for r, (p, w) in enumerate(ROWS) if w is not None]
    (tmp_path / "pairs.csv").write_text("\n".join(lines))
    assert len(load_examples(tmp_path / "pairs.csv", "pairs")) == 2


def test_a_folder_with_metadata(tmp_path):
    write_pairs(tmp_path, "metadata.jsonl")
    assert_the_pairs(load_examples(tmp_path, "pairs"))


def test_a_folder_of_images_with_captions_beside_them(tmp_path):
    write_images(tmp_path, ["b.png", "sub/a.jpg"])
    (tmp_path / "b.txt").write_text("a boat\n")
    (tmp_path / "sub/a.txt").write_text("an ape")
    dataset = load_examples(tmp_path, "winners")
    assert [(e.id, e.prompts) for e in dataset.examples] == [("b.png", ("a boat",)), ("sub/a.jpg", ("an ape",))]


def test_an_imagefolder_with_file_names(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"])
    write_jsonl(tmp_path / "metadata.jsonl", [{"file_name": "b.png", "text": "a boat", "label": 1}])
    dataset = load_examples(tmp_path, "unpaired")
    assert [(e.prompts, e.fields) for e in dataset.examples] == [(("a boat",), {"label": 1.0})]


def test_liked_and_disliked_folders(tmp_path):
    write_images(tmp_path, ["liked/1.png", "liked/2.png", "disliked/1.png"])
    (tmp_path / "liked/1.txt").write_text("my cat")
    options = SourceOptions(default_prompt="a cat")
    dataset = load_examples(tmp_path, "unpaired", options)
    labels = {e.id: (e.prompts[0], e.fields["label"]) for e in dataset.examples}
    assert labels == {"liked/1.png": ("my cat", 1), "liked/2.png": ("a cat", 1), "disliked/1.png": ("a cat", 0)}
    (example,) = load_examples(tmp_path, "pairs", options).examples
    assert [image.name for image in example.images] == ["liked/2.png", "disliked/1.png"]
    assert len(load_examples(tmp_path, "winners", options)) == 2
    with pytest.raises(UserError, match=r"liked/2\.png in .* has no caption: write one into 2\.txt .*--default_prompt"):
        load_examples(tmp_path, "unpaired")


def test_parquet_files_of_a_split(tmp_path):
    as_dataset().to_parquet(tmp_path / "train-00000.parquet")
    as_dataset().select([0]).to_parquet(tmp_path / "test-00000.parquet")
    assert_the_pairs(load_examples(tmp_path / "train-00000.parquet", "pairs"))
    assert_the_pairs(load_examples(tmp_path, "pairs"))
    assert len(load_examples(tmp_path, "pairs", SourceOptions(split="test"))) == 1


def test_a_dataset_saved_to_disk(tmp_path):
    as_dataset().save_to_disk(tmp_path / "one")
    assert_the_pairs(load_examples(tmp_path / "one", "pairs"))
    datasets.DatasetDict({"train": as_dataset()}).save_to_disk(tmp_path / "splits")
    assert_the_pairs(load_examples(tmp_path / "splits", "pairs"))
    with pytest.raises(UserError, match="no split 'trian': did you mean 'train'"):
        load_examples(tmp_path / "splits", "pairs", SourceOptions(split="trian"))


@pytest.mark.parametrize("streaming", [False, True])
def test_webdataset_shards(tmp_path, streaming):
    with tarfile.open(tmp_path / "shard-0.tar", "w") as tar:
        for row, (prompt, winner) in enumerate(ROWS[:2]):
            better, worse = images_of(row)[winner], images_of(row)[1 - winner]
            parts = {"chosen.png": better, "rejected.png": worse, "json": json.dumps({"prompt": prompt}).encode()}
            for name, data in parts.items():
                info = tarfile.TarInfo(f"{row:04d}.{name}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    dataset = load_examples(tmp_path, "pairs", SourceOptions(streaming=streaming))
    examples = list(dataset.open()) if isinstance(dataset, StreamSet) else dataset.examples
    assert isinstance(dataset, StreamSet) == streaming
    assert [e.prompts[0] for e in examples] == [prompt for prompt, _ in ROWS[:2]]
    assert [[image.read() for image in e.images] for e in examples] == [images_of(0), images_of(1)[::-1]]


@pytest.mark.parametrize("streaming", [False, True])
def test_pickapic_as_published(tmp_path, streaming):
    pq.write_table(pa.Table.from_pylist(pickapic_rows()), tmp_path / "train-00000-of-00001.parquet")
    dataset = load_examples(tmp_path, "pairs", SourceOptions(streaming=streaming))
    if streaming:
        dataset = ExampleSet("pairs", list(dataset.open()), notes={"ties dropped": dataset.notes["ties dropped"]})
    assert_the_pairs(dataset)
    assert all(set(e.fields) == set() for e in dataset.examples)


def test_pickapic_serves_other_kinds(tmp_path):
    pq.write_table(pa.Table.from_pylist(pickapic_rows()), tmp_path / "train.parquet")
    assert len(load_examples(tmp_path, "unpaired")) == 4
    assert len(load_examples(tmp_path, "winners")) == 2
    assert len(load_examples(tmp_path, "prompts")) == 3
    assert len(load_examples(tmp_path, "mismatched_captions")) == 2


def test_hpd_as_published(tmp_path):
    write_images(tmp_path / "train", ["0.jpg", "1.jpg"])
    write_images(tmp_path / "test", ["0.jpg", "1.jpg", "2.jpg"])
    train = [{"human_preference": [0, 1], "prompt": "x", "file_path": ["0.jpg", "1.jpg"], "user_hash": "h"}]
    ranks = [{"user_hash": "h", "rank": [2, 3, 1]}]
    test = [{"prompt": "y", "image_path": ["0.jpg", "1.jpg", "2.jpg"], "rank": [2, 3, 1], "raw_annotations": ranks}]
    (tmp_path / "train.json").write_text(json.dumps(train))
    (tmp_path / "test.json").write_text(json.dumps(test))
    (pair,) = load_examples(tmp_path, "pairs").examples
    assert [image.name for image in pair.images] == ["1.jpg", "0.jpg"]
    assert all(image.decode().size == (12, 12) for image in pair.images)
    (ranked,) = load_examples(tmp_path, "ranked_lists", SourceOptions(split="test")).examples
    assert [image.name for image in ranked.images] == ["2.jpg", "0.jpg", "1.jpg"]
    assert ranked.images[0].read() == (tmp_path / "test/2.jpg").read_bytes()


def test_lists_of_images_are_counted_without_being_read(monkeypatch):
    rows = [*table_rows(), {"prompt": "no images at all", "images": None, "winner": None}]
    table = datasets.Dataset.from_list(rows, features=as_dataset().features)

    class Unread:
        """A cell that knows its length and gives nothing out."""

        def __init__(self, view, index):
            self.is_valid = view[index].column(0)[0].is_valid

        def __len__(self):
            return 2

    with monkeypatch.context() as patched:
        patched.setattr("diffalign.data.hf_tables._stored", Unread)
        assert len(load_examples(table, "prompts")) == 4
        found = load_examples(table, "winners").examples
    assert [e.images[0].read() for e in found] == [images_of(0)[0], images_of(1)[1]]


def test_streams_are_read_again_in_the_same_order():
    stream = load_examples(as_dataset().to_iterable_dataset(), "pairs")
    assert isinstance(stream, StreamSet)
    first, second = list(stream.open()), list(stream.open())
    assert [e.id for e in first] == [e.id for e in second] == ["row-0", "row-1"]
    assert first[0].images[0].read() == encoded(0)
    assert stream.notes["ties dropped"] == 1


@pytest.mark.parametrize("as_picture", [False, True])
def test_streams_of_unknown_columns(as_picture):
    """Streams from a generator, and mapped ones, do not know their columns before they are read."""

    def rows():
        for row, (prompt, winner) in enumerate(ROWS):
            images = [picture(2 * row), picture(2 * row + 1)] if as_picture else images_of(row)
            yield {"prompt": prompt, "images": images, "winner": winner}

    stream = datasets.IterableDataset.from_generator(rows)
    assert stream.features is None
    first, second = load_examples(stream, "pairs").open()
    assert [first.prompts[0], second.prompts[0]] == [prompt for prompt, _ in ROWS[:2]]
    assert [np.asarray(image.decode()).tolist() for image in second.images] == [
        np.asarray(picture(seed)).tolist() for seed in (3, 2)
    ]
    mapped = as_dataset().to_iterable_dataset().map(lambda row: {"prompt": f"{row['prompt']}!"})
    assert [e.prompts[0] for e in load_examples(mapped, "pairs").open()] == ["a red cat!", "a blue dog!"]
    with pytest.raises(UserError, match="is empty: the stream ended before its first row"):
        load_examples(datasets.IterableDataset.from_generator(lambda: iter(())), "pairs")
    with pytest.raises(UserError, match="has no column 'prompt'"):
        load_examples(datasets.IterableDataset.from_generator(lambda: iter([{"a": 1}])), "pairs")


def test_streams_cannot_edit_captions():
    stream = load_examples(as_dataset().to_iterable_dataset(), "mismatched_captions")
    with pytest.raises(UserError, match="give a column 'mismatched', or load the data set without streaming"):
        list(stream.open())


def test_columns_are_mapped(tmp_path):
    write_images(tmp_path, ["a.png", "b.png"])
    path = write_jsonl(tmp_path / "x.jsonl", [{"description": "x", "good": "a.png", "bad": "b.png"}])
    options = SourceOptions(column_map={"prompt": "description", "chosen": "good", "rejected": "bad"})
    (example,) = load_examples(path, "pairs", options).examples
    assert [image.name for image in example.images] == ["a.png", "b.png"]


def test_only_so_many_samples():
    assert len(load_examples(table_rows(), "pairs", SourceOptions(max_samples=1))) == 1


def test_lists_become_pairs_by_rule():
    rows = [{"prompt": "x", "images": [picture(i) for i in range(4)], "scores": [0, 1, 2, 3]}]
    for rule, count in (("best_worst", 1), ("adjacent", 3), ("all", 6)):
        assert len(load_examples(rows, "pairs", SourceOptions(pairing=PairingOptions(rule)))) == count


def test_the_bundled_layout(tmp_path):
    names = ["p-0", "p-1", "p-2"]
    images = [
        {
            "image_id": n,
            "prompt": "a red circle",
            "metadata": '{"tag": "colors"}',
            "image": encoded(i),
            "proxy": 3.0 - i,
        }
        for i, n in enumerate(names)
    ]
    tables = {
        "images": images,
        "pairs": [{"prompt": "a red circle", "image_w": "p-0", "image_l": "p-2"}],
        "lists": [{"prompt": "a red circle", "images": names, "scores": [3.0, 2.0, 1.0]}],
    }
    for name, rows in tables.items():
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
    assert detect_format(tmp_path) == "bundled"
    (pair,) = load_examples(tmp_path, "pairs").examples
    assert [image.name for image in pair.images] == ["p-0", "p-2"]
    assert pair.fields == {"scores": (3.0, 1.0)}
    assert pair.metadata == {"tag": "colors"}
    (ranked,) = load_examples(tmp_path, "ranked_lists").examples
    assert ranked.fields["scores"] == (3.0, 2.0, 1.0)
    assert [e.prompts for e in load_examples(tmp_path, "prompts").examples] == [("a red circle",)]
    assert len(load_examples(tmp_path, "unpaired")) == 2
    held = load_examples(tmp_path, "pairs").held_out("test", 5, 0)
    assert len(held.prompts) == len(held.metadata) == 5
    with pytest.raises(UserError, match="has no column 'graded'"):
        load_examples(tmp_path, "pairs", BY_VERIFIER)


BY_VERIFIER = SourceOptions(column_map={"scores": "graded"})


def bundled_grades() -> dict[str, float]:
    table = pq.read_table(bundled_path("preferences") / "images.parquet", columns=["image_id", "graded"])
    return {row["image_id"]: row["graded"] for row in table.to_pylist()}


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "ranked_lists", "winners"])
def test_the_verifier_judges_bundled_images_in_place_of_the_proxy(kind):
    grades = bundled_grades()
    usual, judged = (load_examples("bundled", kind, options) for options in (SourceOptions(), BY_VERIFIER))
    assert 0 < len(judged) < len(usual)
    assert any(reason.endswith("dropped") and count for reason, count in judged.notes.items())
    assert {name for example in judged.examples for name in example.fields} == {
        name for example in usual.examples for name in example.fields
    }
    for example in judged.examples:
        values = tuple(grades[image.name] for image in example.images)
        if kind in ("pairs", "ranked_lists"):
            assert example.fields["scores"] == values == tuple(sorted(values, reverse=True))
            assert values[0] > values[-1]


def test_every_bundled_pair_of_equal_grades_is_dropped_and_counted():
    grades = bundled_grades()
    usual, judged = (load_examples("bundled", "pairs", options) for options in (SourceOptions(), BY_VERIFIER))
    tied = [e for e in usual.examples if grades[e.images[0].name] == grades[e.images[1].name]]
    assert sum(judged.notes.values()) == len(tied) == len(usual) - len(judged)
    with pytest.raises(UserError, match="did you mean 'graded'"):
        load_examples("bundled", "pairs", SourceOptions(column_map={"scores": "graed"}))


def test_rendered_pictures_show_their_captions_and_are_the_same_each_time():
    examples = load_examples("rendered", "winners", SourceOptions(max_samples=40)).examples
    assert len(examples) == 40
    for example in examples:
        assert verify(np.asarray(example.images[0].decode()), example.metadata).correct
    again = load_examples("rendered", "winners", SourceOptions(max_samples=40)).examples
    assert [e.images[0].read() for e in examples] == [e.images[0].read() for e in again]
    mismatched = load_examples("rendered", "mismatched_captions").examples
    assert len(mismatched) > 1000
    held = set(load_examples("rendered", "winners").held_out("test", 400, 0).prompts)
    compositions = {record.text for record in prompts("test", 400, 0) if not record.shared}
    assert compositions <= held
    assert not compositions & {e.prompts[0] for e in mismatched}
    with pytest.raises(UserError, match="rendered pictures"):
        load_examples("rendered", "pairs")


def test_a_text_file_holds_one_caption_a_line(tmp_path):
    (tmp_path / "captions.txt").write_text("a red cat\n\n  a blue dog \n")
    examples = load_examples(tmp_path / "captions.txt", "prompts").examples
    assert [example.prompts for example in examples] == [("a red cat",), ("a blue dog",)]
    (tmp_path / "none.txt").write_text("\n")
    with pytest.raises(UserError, match="no caption"):
        load_examples(tmp_path / "none.txt", "prompts")


def test_rows_of_geneval_describe_their_captions(tmp_path):
    row = {"tag": "counting", "include": [{"class": "clock", "count": 4}], "exclude": [], "prompt": "four clocks"}
    (example,) = load_examples(write_jsonl(tmp_path / "evaluation_metadata.jsonl", [row]), "prompts").examples
    assert example.prompts == ("four clocks",)
    assert example.metadata == row


def test_bundled_captions_bring_what_the_verifier_reads():
    examples = load_examples("bundled", "prompts").examples
    assert len({example.prompts for example in examples}) == len(examples) > 500
    assert all(example.metadata["include"] for example in examples)


def test_captions_alone_are_enough_where_no_more_is_wanted():
    examples = load_examples(["a red cat", "a blue dog"], "prompts").examples
    assert [example.prompts[0] for example in examples] == ["a red cat", "a blue dog"]
    with pytest.raises(UserError, match=r"rows, row 0 \(counted from 0\) is a value of type str; expected a mapping"):
        load_examples(["a red cat"], "pairs")
    with pytest.raises(UserError, match=r"rows, row 1 \(counted from 0\) is a value of type int"):
        load_examples(["a red cat", 7], "prompts")
