"""Stage "preferences": ranked lists of four samples of tiny-sd for training captions, and the pairs they hold.

Every picture is stored once, losslessly, with the proxy's score, the verifier's verdict and its graded score. The
winner of a pair has the higher proxy score, by a margin, and not the lower verdict.
"""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from diffalign.rewards.pickscore import PickScore
from diffalign.world.verifier import verify
from train_scripts.world import samples
from train_scripts.world.fitting import batches
from train_scripts.world.pictures import to_pictures
from train_scripts.world.workspace import Workspace

NAME = "preferences"
PAIR_MARGIN = 0.5
"""Least difference in proxy score of a pair: a preference of 62 %."""
SCHEMAS = {
    "images": pa.schema(
        [
            ("image_id", pa.string()),
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("metadata", pa.string()),
            ("image", pa.binary()),
            ("proxy", pa.float64()),
            ("verifier", pa.bool_()),
            ("graded", pa.float64()),
            ("seed", pa.int64()),
        ]
    ),
    "lists": pa.schema(
        [
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("images", pa.list_(pa.string())),
            ("scores", pa.list_(pa.float64())),
        ]
    ),
    "pairs": pa.schema(
        [
            ("prompt_id", pa.string()),
            ("prompt", pa.string()),
            ("image_w", pa.string()),
            ("image_l", pa.string()),
            ("proxy_margin", pa.float64()),
            ("graded_margin", pa.float64()),
        ]
    ),
}
"""Columns of the three tables; the card says what they mean."""
Row = dict[str, Any]


def make(workspace: Workspace) -> None:
    """Score the samples and write the tables of the train split and, in a folder of its own, of the tune split."""
    proxy = PickScore.load(str(workspace.out / "tiny-pickscore"))
    for plan, folder in ((samples.TRAIN, workspace.out / NAME), (samples.TUNE, workspace.out / NAME / "tune")):
        images = scored(samples.load(workspace, plan), plan.split, proxy)
        size = samples.LIST_SIZE
        ranked = [rank(images[i : i + size]) for i in range(0, len(images), size)]
        write(folder, "images", images)
        write(folder, "lists", [as_list(group) for group in ranked])
        write(folder, "pairs", [pair for group in ranked for pair in pairs_of(group)])


def scored(drawn: samples.SampleSet, split: str, proxy: PickScore) -> list[Row]:
    """Return a row for each picture."""
    rows: list[Row] = []
    for chunk in batches(len(drawn.images), 64):
        records = drawn.records[chunk]
        pictures = to_pictures(drawn.images[chunk])
        scores = proxy.score((drawn.images[chunk] + 1) / 2, [record.text for record in records]).tolist()
        for picture, record, score, seed in zip(pictures, records, scores, drawn.seeds[chunk], strict=True):
            verdict = verify(picture, record.metadata)
            rows.append(
                {
                    "image_id": f"{split}-{len(rows):05d}",
                    "prompt_id": f"{split}-{len(rows) // samples.LIST_SIZE:05d}",
                    "prompt": record.text,
                    "metadata": json.dumps(record.metadata),
                    "image": lossless(picture),
                    "proxy": score,
                    "verifier": verdict.correct,
                    "graded": verdict.graded,
                    "seed": seed,
                }
            )
    return rows


def rank(group: list[Row]) -> list[Row]:
    """Sort the pictures of one caption, best first."""
    return sorted(group, key=lambda row: -row["proxy"])


def as_list(ranked: list[Row]) -> Row:
    """Return the row of a ranked list."""
    first = ranked[0]
    return {
        "prompt_id": first["prompt_id"],
        "prompt": first["prompt"],
        "images": [row["image_id"] for row in ranked],
        "scores": [row["proxy"] for row in ranked],
    }


def pairs_of(ranked: list[Row]) -> list[Row]:
    """Return the pairs of a list (best first) with a clear margin that the verifier does not contradict."""
    return [
        {
            "prompt_id": winner["prompt_id"],
            "prompt": winner["prompt"],
            "image_w": winner["image_id"],
            "image_l": loser["image_id"],
            "proxy_margin": winner["proxy"] - loser["proxy"],
            "graded_margin": winner["graded"] - loser["graded"],
        }
        for index, winner in enumerate(ranked)
        for loser in ranked[index + 1 :]
        if winner["proxy"] - loser["proxy"] >= PAIR_MARGIN
        and (winner["verifier"], winner["graded"]) >= (loser["verifier"], loser["graded"])
    ]


def lossless(picture: NDArray[Any]) -> bytes:
    """Encode a picture (height, width, 3), uint8, as lossless WebP."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "WEBP", lossless=True, quality=80, method=4)
    return buffer.getvalue()


def write(folder: Path, name: str, rows: list[Row]) -> None:
    """Write a table."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, SCHEMAS[name]), folder / f"{name}.parquet", compression="zstd")
