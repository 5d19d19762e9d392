"""From data sources to questions."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffalign.data.readers import SourceOptions
from diffalign.errors import UserError
from diffalign.label.collect import collect_tasks
from diffalign.label.tasks import media_type
from tests.data.support import encoded, write_images, write_jsonl


def write_source(folder: Path, tasks: int, images: int = 2) -> Path:
    names = [[f"pictures/{task}-{image}.png" for image in range(images)] for task in range(tasks)]
    write_images(folder, [name for group in names for name in group])
    return write_jsonl(
        folder / "tasks.jsonl", [{"prompt": f"caption {i}", "images": group} for i, group in enumerate(names)]
    )


def collect(source: Path | str, tmp_path: Path, **options):
    return collect_tasks(str(source), tmp_path / "unpacked", **options)


def test_rows_of_several_images_are_tasks(tmp_path: Path) -> None:
    found = collect(write_source(tmp_path, 3, images=4), tmp_path)
    assert found.root == tmp_path.resolve()
    assert [task.prompt for task in found.tasks] == ["caption 0", "caption 1", "caption 2"]
    assert found.tasks[1].images == tuple(f"pictures/1-{i}.png" for i in range(4))
    assert not (tmp_path / "unpacked").exists()
    assert len(collect(tmp_path / "tasks.jsonl", tmp_path, limit=2).tasks) == 2


def test_single_images_are_gathered_by_caption(tmp_path: Path) -> None:
    names = [f"{model}/{index}.png" for model in ("before", "after") for index in range(3)]
    write_images(tmp_path, [*names, "before/alone.png"])
    for name in names:
        (tmp_path / name).with_suffix(".txt").write_text(f"caption {Path(name).stem}")
    (tmp_path / "before/alone.txt").write_text("another")
    found = collect(tmp_path, tmp_path)
    assert [task.images for task in found.tasks] == [(f"after/{i}.png", f"before/{i}.png") for i in range(3)]
    assert found.notes == {"images left out, too few of their caption": 1}
    one = collect(tmp_path, tmp_path, images_per_task=1)
    assert len(one.tasks) == 7


def test_ids_stay_when_the_source_grows(tmp_path: Path) -> None:
    few = collect(write_source(tmp_path, 2), tmp_path)
    more = collect(write_source(tmp_path, 4), tmp_path)
    assert [task.id for task in more.tasks][:2] == [task.id for task in few.tasks]
    assert len({task.id for task in more.tasks}) == 4


def test_repeated_rows_are_one_task(tmp_path: Path) -> None:
    write_images(tmp_path, ["a.png", "b.png"])
    rows = [{"prompt": "x", "images": ["a.png", "b.png"]}] * 2
    found = collect(write_jsonl(tmp_path / "rows.jsonl", rows), tmp_path)
    assert len(found.tasks) == 1
    assert found.notes == {"repeated rows left out": 1}


def test_images_inside_tables_are_unpacked_once(tmp_path: Path) -> None:
    found = collect("bundled", tmp_path, limit=3)
    assert found.root == (tmp_path / "unpacked").resolve()
    files = sorted(path.name for path in found.root.iterdir())
    assert files == sorted({name for task in found.tasks for name in task.images})
    assert all(media_type(found.root / name) == "image/webp" for name in files)
    assert found.tasks[0].metadata
    assert collect("bundled", tmp_path, limit=3) == found


def test_what_cannot_be_asked_is_refused(tmp_path: Path) -> None:
    def message(rows: list[dict[str, object]], **options: object) -> str:
        path = write_jsonl(tmp_path / "in" / "rows.jsonl", rows)
        with pytest.raises(UserError) as error:
            collect(path, tmp_path, **options)
        return str(error.value)

    write_images(tmp_path, ["in/a.png", "in/b.png", "out.png"])
    (tmp_path / "in/text.png").write_text("no picture")
    (tmp_path / "in/picture.tiff").write_bytes(encoded(0, format="TIFF"))
    os.symlink(tmp_path / "out.png", tmp_path / "in/link.png")
    for other, said in (
        ("../out.png", "lies outside"),
        (str(tmp_path / "out.png"), "lies outside"),
        ("link.png", "lies outside"),
        ("gone.png", "it is missing or no image"),
        ("text.png", "it is missing or no image"),
        ("picture.tiff", "is of format TIFF"),
    ):
        assert said in message([{"prompt": "x", "images": ["a.png", other]}])
    assert "nothing to label" in message([{"prompt": "x", "images": ["a.png"]}])
    assert "at most 9" in message([{"prompt": "x", "images": ["a.png"] * 10}])
    assert "expected 1 to 9" in message([{"prompt": "x", "images": ["a.png"]}], images_per_task=0)
    with pytest.raises(UserError, match="no caption"):
        collect_tasks(str(tmp_path / "in"), tmp_path, options=SourceOptions(data_format="image_folder"))
