"""Benchmarks judged by a vision-language model: their questions on pictures, and answers in the benchmarks' formats.

The wording is our own, so that figures are "dpg-like" and "unigenbench-like" whatever the model. Answers are kept as
they come (``Transcript``): an evaluation that breaks off asks only what is left.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from diffalign.errors import UserError
from diffalign.evaluation.dpg import Question as DpgQuestion
from diffalign.evaluation.generation import TABLE
from diffalign.rewards.scoring import Item, open_picture, read_items
from diffalign.rewards.vlm import Question, Transcript

VERSION = "1"
"""Of the wordings; answers to others are not used again."""
DPG = "{question} Answer with one word, yes or no."
UNIGEN = """This picture was generated for the caption:
{caption}

Judge every point by itself: 1 if the picture fulfils it, 0 if it does not.
{points}

Write one reason a point as a list between <analysis> and </analysis>, then the {count} numbers as a list between
<score> and </score>, such as <score>[1, 0]</score>."""
_SCORES = re.compile(r"<score>(.*?)</score>", re.DOTALL)
_WORD = re.compile(r"[a-z]+")


def read_tiles(folder: Path) -> dict[str, list[Image.Image]]:
    """Read the images of DPG-Bench's captions.

    Args:
        folder: drawn from a folder of captions (``images.jsonl`` with "item_id"), or the official pictures
            ``<item_id>.png``, each a grid of two by two.

    Returns:
        caption's id -> its images; those of a grid row by row.

    Raises:
        UserError: if there are none, or one cannot be read.
    """
    if (folder / TABLE).is_file():
        tiles: dict[str, list[Image.Image]] = {}
        for item in read_items(folder / TABLE):
            if item.metadata is None or "item_id" not in item.metadata:
                raise UserError(f"{item.image} has no 'item_id': draw images from DPG-Bench's folder of captions")
            tiles.setdefault(str(item.metadata["item_id"]), []).append(open_picture(item.image))
        return tiles
    grids = sorted(folder.glob("*.png")) if folder.is_dir() else []
    if not grids:
        raise UserError(f"no images in {folder}: expected {TABLE}, or grids <item_id>.png")
    return {path.stem: quarters(open_picture(path)) for path in grids}


def quarters(grid: Image.Image) -> list[Image.Image]:
    """Cut a grid of two by two: top left, top right, bottom left, bottom right."""
    width, height = grid.width // 2, grid.height // 2
    corners = [(x, y) for y in (0, height) for x in (0, width)]
    return [grid.crop((x, y, x + width, y + height)) for x, y in corners]


def ask_dpg(
    tiles: Mapping[str, Sequence[Image.Image]], questions: Mapping[str, Sequence[DpgQuestion]], judge: Transcript
) -> list[dict[str, Any]]:
    """Ask every question on every image.

    Args:
        tiles: caption's id -> its images.
        questions: caption's id -> what is asked.
        judge: answers.

    Returns:
        rows of ``item_id``, ``tile``, ``proposition_id``, ``answer`` (its first word) and ``text``.

    Raises:
        UserError: for captions without images, or questions that stay unanswered.
    """
    if missing := [item for item in questions if not tiles.get(item)]:
        raise UserError(f"{len(missing)} of {len(questions)} captions have no images, first {missing[0]}")
    rows = []
    for item, asked in questions.items():
        for tile, picture in enumerate(tiles[item]):
            wording = [Question([picture], DPG.format(question=q.text), template=f"dpg/{VERSION}") for q in asked]
            for question, answer in zip(asked, judge.ask(wording), strict=True):
                word = _WORD.search(answer.text.lower())
                place = {"item_id": item, "tile": tile, "proposition_id": question.number}
                rows.append({**place, "answer": word[0] if word else "", "text": answer.text})
    return rows


def ask_unigenbench(items: Sequence[Item], judge: Transcript) -> list[dict[str, Any]]:
    """Ask for all points of every image at once.

    Args:
        items: images drawn from UniGenBench's table of captions.
        judge: answers.

    Returns:
        rows of ``image``, ``testpoint`` and ``result_json``; the latter None where no scores can be read.

    Raises:
        UserError: for images without points, or questions that stay unanswered.
    """
    rows = []
    for item in items:
        names, descriptions = _points(item)
        points = [f"{i}. {name}: {text}" for i, (name, text) in enumerate(zip(names, descriptions, strict=True), 1)]
        wording = UNIGEN.format(caption=item.prompt, points="\n".join(points), count=len(points))
        (answer,) = judge.ask([Question([open_picture(item.image)], wording, template=f"unigenbench/{VERSION}")])
        scores = read_scores(answer.text, len(points))
        result = None if scores is None else {"score": scores}
        rows.append({"image": str(item.image), "testpoint": names, "result_json": result, "text": answer.text})
    return rows


def read_scores(text: str, count: int) -> list[int] | None:
    """Read the last ``<score>[1, 0, ...]</score>``; None unless it has ``count`` entries."""
    found = _SCORES.findall(text)
    try:
        scores = ast.literal_eval(found[-1].strip())
    except (IndexError, ValueError, SyntaxError):
        return None
    return scores if isinstance(scores, list) and len(scores) == count else None


def _points(item: Item) -> tuple[list[str], list[str]]:
    described = next((v for v in (item.metadata or {}).values() if isinstance(v, Mapping) and "Testpoints" in v), None)
    if described is None:
        raise UserError(f"{item.image} has no 'Testpoints': draw images from UniGenBench's table of captions")
    names, descriptions = list(described["Testpoints"]), list(described.get("Testpoint Description", []))
    if len(names) != len(descriptions):
        raise UserError(f"{item.image} has {len(names)} points and {len(descriptions)} descriptions of them")
    return names, descriptions
