"""Text as people save it: byte order marks, foreign line ends, other encodings; in every place that reads captions."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from diffalign.data.file_tables import read_annotations, read_captions
from diffalign.errors import UserError
from diffalign.evaluation.prompt_sets import load_prompts
from diffalign.records import read_json, read_jsonl, read_lines, read_text, read_yaml
from diffalign.rewards.scoring import read_items

CAPTION = "a cat\u2028and\u0085a dog"
"""Characters at which ``str.splitlines`` cuts, and which JSON allows within strings."""


def test_only_line_feeds_and_carriage_returns_end_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(f"{CAPTION}\r\nb\rc\n".encode("utf-8-sig"))
    assert read_lines(path) == [CAPTION, "b", "c", ""]


@pytest.mark.parametrize(
    ("data", "place"),
    [
        (b"ab\xe9", r"line 1: byte 3 of the line \(0xe9\)"),
        (b"\xef\xbb\xbfa\r\nb\xe9\n", r"line 2: byte 2 of the line \(0xe9\)"),
        ("a".encode("utf-16"), r"line 1: byte 1 of the line \(0xff\)"),
    ],
)
def test_the_first_byte_that_is_not_utf8_is_named(tmp_path: Path, data: bytes, place: str) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"x\.txt, {place} is not UTF-8; save the file as UTF-8"):
        read_text(path)


def test_absent_files_are_named(tmp_path: Path) -> None:
    for read in (read_text, read_json, read_jsonl, read_yaml):
        with pytest.raises(UserError, match=r"there is no file .*x\.json"):
            read(tmp_path / "x.json")


@pytest.mark.parametrize(
    ("text", "value"),
    [("3e-4", 3e-4), ("1E6", 1e6), ("-2e+3", -2e3), (".5e1", 5.0), ("3.e5", 3e5), ("[1e2, 3]", [100.0, 3])]
    + [(text, text) for text in ("12e", "e3", "1e4a", "1e-4-x")]
    + [("'3e-4'", "3e-4"), ("0x1e4", 0x1E4), ("1.5", 1.5)],
)
def test_numbers_of_yaml_need_no_point_before_their_exponent(tmp_path: Path, text: str, value: object) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(f"rate: {text}\n")
    found = read_yaml(path)["rate"]
    assert found == value
    assert type(found) is type(value)


def test_damaged_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text("a: [1")
    with pytest.raises(UserError, match=r"x\.yaml is not valid YAML: .*line 1"):
        read_yaml(tmp_path / "x.yaml")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_captions_survive_every_reader(tmp_path: Path, encoding: str) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    row = json.dumps({"image": "0.png", "prompt": CAPTION}, ensure_ascii=False)
    contents = {"x.jsonl": row + "\n", "x.csv": f"prompt,image\r\n{CAPTION},0.png\r\n", "x.txt": CAPTION + "\n"}
    for name, text in contents.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert [prompt.text for prompt in load_prompts(str(tmp_path / name)).prompts] == [CAPTION]
    for name in ("x.jsonl", "x.csv"):
        assert list(read_annotations(tmp_path / name).rows()) == [{"prompt": CAPTION, "image": "0.png"}]
    assert list(read_captions(tmp_path / "x.txt").rows()) == [{"prompt": CAPTION}]
    assert read_jsonl(tmp_path / "x.jsonl")[0]["prompt"] == CAPTION
    assert [item.prompt for item in read_items(tmp_path / "x.jsonl")] == [CAPTION]
    assert [item.prompt for item in read_items(tmp_path, tmp_path / "x.txt")] == [CAPTION]


@pytest.mark.parametrize("name", ["x.jsonl", "x.csv", "x.txt"])
def test_captions_of_a_benchmark_that_are_not_utf8(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(UserError, match=rf"{name}, line 1: byte 16 of the line"):
        load_prompts(str(tmp_path / name))
