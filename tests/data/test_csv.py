"""CSV: the meaning of a cell is that of its column; rows of another length are refused by line."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffalign.data.csv_tables import read_csv
from diffalign.data.load import load_examples
from diffalign.data.readers import SourceOptions
from diffalign.errors import UserError
from tests.data.support import encoded


def table(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n")
    return path


def test_captions_that_look_like_numbers_stay_text(tmp_path):
    words = ["42", "nan", "1e5", "true", "Infinity", "0x10", "[1]"]
    for name in ("7", "8"):
        (tmp_path / name).write_bytes(encoded(int(name)))
    path = table(tmp_path / "x.csv", "prompt,image_0,image_1,winner", *(f"{word},7,8,1" for word in words))
    assert [example.prompts[0] for example in load_examples(path, "pairs").examples] == words
    # also under a name of the file's own, and where all captions are numbers
    path = table(tmp_path / "y.csv", "description,a,b", "42,7,8", "43,7,8")
    names = {"prompt": "description", "chosen": "a", "rejected": "b"}
    dataset = load_examples(path, "pairs", SourceOptions(column_map=names))
    assert [example.prompts[0] for example in dataset.examples] == ["42", "43"]
    (tmp_path / "x.csv").unlink()
    table(tmp_path / "metadata.csv", "file_name,description", "7,42")
    folder = SourceOptions(column_map={"prompt": "description"}, data_format="image_folder")
    assert load_examples(tmp_path, "winners", folder).examples[0].prompts == ("42",)


def test_cells_by_their_column(tmp_path):
    header = "prompt,id,winner,label,scores,ranking,margin,user,when"
    path = table(
        tmp_path / "x.csv",
        header,
        '1,007,1.0,TRUE,"[0.5, 2]","[1, 0]",3,9,5',
        "2,8,tie,0.5,,,1e-1,anna,nan",
        ",,,,,,,,",
    )
    rows, lines = read_csv(path, {})
    assert lines == [2, 3, 4]
    assert rows[0] == {
        "prompt": "1", "id": "007", "winner": 1, "label": True, "scores": [0.5, 2], "ranking": [1, 0], "margin": 3,
        "user": "9", "when": "5",
    }  # fmt: skip
    assert rows[1] == {
        "prompt": "2", "id": "8", "winner": "tie", "label": 0.5, "scores": None, "ranking": None, "margin": 0.1,
        "user": "anna", "when": "nan",
    }  # fmt: skip
    assert set(rows[2].values()) == {None}
    assert isinstance(rows[0]["winner"], int)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["prompt,winner", "a,1", "b, c,1"], r"x\.csv, line 3: 3 cells where the header names 2 columns; .*quotes"),
        (["prompt,winner", '"a', 'b",1', "c"], r"x\.csv, line 4: 1 cells where the header names 2"),
        (["prompt,scores", "a,1;2"], r"x\.csv, line 2: '1;2' is not valid JSON"),
        (["prompt", "a" * 200_000], r"x\.csv, line 2: not valid CSV: field larger"),
        (["prompt,winner"], "is empty: it holds no row"),
    ],
)
def test_bad_lines_are_named(tmp_path, lines, message):
    with pytest.raises(UserError, match=message):
        load_examples(table(tmp_path / "x.csv", *lines), "prompts")
