"""Scoring image files: read captions and pictures, score them by several rewards, write what was measured and how."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from diffalign.errors import UserError
from diffalign.records import read_lines, read_text, write_json, write_jsonl
from diffalign.rewards.base import Reward
from diffalign.rewards.identity import weights_hash

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True)
class Item:
    """An image file with its caption.

    Args:
        image: the file.
        prompt: the caption.
        metadata: the caption's structured description, for rewards that need it.
    """

    image: Path
    prompt: str
    metadata: Mapping[str, Any] | None = None


def read_items(source: Path, prompts: Path | None = None) -> list[Item]:
    """List what is to be scored.

    Args:
        source: a JSONL file of rows with "image" (path relative to the file), "prompt" and perhaps "metadata"; or a
            folder of images, each with its caption in a text file of the same name.
        prompts: for a folder, a text file with one caption a line, in the order of the sorted file names.

    Raises:
        UserError: for an absent source, a row without its columns, a missing image or caption, unequal counts, or text
            that is not UTF-8.
    """
    items = _from_folder(source, prompts) if source.is_dir() else _from_table(source)
    if not items:
        raise UserError(f"no images in {source}; known kinds: {', '.join(SUFFIXES)}")
    if missing := [str(item.image) for item in items if not item.image.is_file()]:
        raise UserError(f"{len(missing)} of {len(items)} images do not exist, first {missing[0]}")
    return items


def _from_table(path: Path) -> list[Item]:
    if not path.is_file():
        raise UserError(f"no images at {path}; give a folder, or a JSONL file with the columns image and prompt")
    items = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            items.append(Item(path.parent / row["image"], row["prompt"], row.get("metadata")))
        except (ValueError, KeyError, TypeError, AttributeError) as problem:
            raise UserError(
                f"{path}, line {number}: expected an object with 'image' and 'prompt' ({problem!r})"
            ) from problem
    return items


def _from_folder(folder: Path, prompts: Path | None) -> list[Item]:
    images = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if prompts is not None:
        if not prompts.is_file():
            raise UserError(f"no prompt file at {prompts}")
        captions = [line for line in read_lines(prompts) if line.strip()]
        if len(captions) != len(images):
            raise UserError(f"{prompts} has {len(captions)} captions, but {folder} has {len(images)} images")
        return [Item(image, caption) for image, caption in zip(images, captions, strict=True)]
    if bare := [image.name for image in images if not image.with_suffix(".txt").is_file()]:
        raise UserError(
            f"{len(bare)} of {len(images)} images in {folder} have no caption, first {bare[0]}; "
            "put it into a .txt file of the same name, or give a file with one caption a line"
        )
    return [Item(image, read_text(image.with_suffix(".txt")).strip()) for image in images]


def score_items(items: Sequence[Item], rewards: Mapping[str, Reward], batch_size: int = 16) -> dict[str, Tensor]:
    """Score files; rewards with an official preprocessing get the pictures through that.

    Args:
        items: what to score.
        rewards: label -> reward.
        batch_size: pictures held at once.

    Returns:
        label -> (items,) float32 on the CPU.

    Raises:
        UserError: for a batch of no pictures, a picture that cannot be read, or metadata that a reward needs and a row
            lacks.
    """
    if batch_size < 1:
        raise UserError(f"the batch size must be positive, not {batch_size}")
    for label, reward in rewards.items():
        lacking = [item for item in items if item.metadata is None]
        if reward.info.needs_metadata and lacking:
            raise UserError(f"the reward {label!r} needs metadata, which {lacking[0].image} has not")
    scores: dict[str, list[Tensor]] = {label: [] for label in rewards}
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        pictures = [open_picture(item.image) for item in batch]
        for label, reward in rewards.items():
            scores[label].append(_score_batch(reward, batch, pictures).float().cpu())
    return {label: torch.cat(parts) for label, parts in scores.items()}


def open_picture(path: Path) -> Image.Image:
    """Read a picture as RGB.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError) as problem:
        raise UserError(f"cannot read the image {path}: {problem}") from problem


@torch.no_grad()
def _score_batch(reward: Reward, items: Sequence[Item], pictures: Sequence[Image.Image]) -> Tensor:
    metadata = [item.metadata or {} for item in items]
    return reward.score_pictures(pictures, [item.prompt for item in items], metadata)


def describe_rewards(rewards: Mapping[str, Reward]) -> dict[str, Any]:
    """Return what every number means and which weights it was made with, for manifests."""
    return {
        label: {
            **asdict(reward.info),
            "range": [str(end) for end in reward.info.range],
            "weights_hash": weights_hash(reward),
        }
        for label, reward in rewards.items()
    }


def write_scores(
    path: Path,
    items: Sequence[Item],
    rewards: Mapping[str, Reward],
    scores: Mapping[str, Tensor],
    generation: Mapping[str, Any] | None = None,
) -> None:
    """Write one JSON line an image, and beside it ``NAME.manifest.json`` with what every number means.

    Args:
        path: the JSONL file.
        items, rewards, scores: as scored.
        generation: how the images were drawn, where that is known.

    Raises:
        UserError: if a file cannot be written.
    """
    columns = {label: values.tolist() for label, values in scores.items()}
    rows = [
        {"image": str(item.image), "prompt": item.prompt, **{label: column[i] for label, column in columns.items()}}
        for i, item in enumerate(items)
    ]
    write_json(
        path.with_suffix(".manifest.json"),
        {
            "images": len(items),
            "rewards": describe_rewards(rewards),
            "means": {label: values.mean().item() for label, values in scores.items()},
            "prompts_sha256": hashlib.sha256("\n".join(item.prompt for item in items).encode()).hexdigest(),
            "generation": None if generation is None else dict(generation),
        },
    )
    write_jsonl(path, rows)
