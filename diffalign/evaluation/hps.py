"""HPSv2's benchmark (arXiv 2306.09341): 800 captions in each of four styles, one image each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from diffalign.errors import UserError
from diffalign.evaluation.prompt_sets import HPS_STYLES, load_prompts
from diffalign.rewards.base import RewardInfo
from diffalign.rewards.ranking import StyleSummary, style_summary
from diffalign.rewards.scoring import Item


@dataclass(frozen=True)
class HpsImages:
    """Images of the benchmark.

    Args:
        items: style by style, in the order of the captions.
        styles: style of each.
        missing: images that are not there.
        prompts_sha256: of the four lists.
    """

    items: Sequence[Item]
    styles: Sequence[str]
    missing: Sequence[str]
    prompts_sha256: str


def read_images(folder: Path, prompts: Path, allow_missing: bool = False) -> HpsImages:
    """Find the image of every caption: ``<style>/<index>.jpg`` (or .png), five digits.

    Args:
        folder: the images.
        prompts: folder with the four lists of captions.
        allow_missing: leave out what is not there, as officially; the number is reported.

    Raises:
        UserError: if the captions or images are missing.
    """
    if not prompts.is_dir():
        raise UserError(f"there is no folder {prompts} with HPSv2's four lists of captions")
    captions = load_prompts(str(prompts))
    items, styles, missing = [], [], []
    for caption in captions.prompts:
        if caption.metadata is None or "style" not in caption.metadata:
            raise UserError(f"{prompts} has no {HPS_STYLES[0]}.json: expected HPSv2's four lists of captions")
        style, index = str(caption.metadata["style"]), int(caption.metadata["index"])
        path = next(
            (p for p in (folder / style / f"{index:05d}{end}" for end in (".jpg", ".png")) if p.is_file()), None
        )
        if path is None:
            missing.append(f"{style}/{index:05d}.jpg")
            continue
        items.append(Item(path, caption.text))
        styles.append(style)
    if not items or (missing and not allow_missing):
        raise UserError(
            f"{len(missing)} of {len(captions.prompts)} images are not in {folder}, first {missing[0]}; "
            "draw them, or allow missing ones"
        )
    return HpsImages(items, styles, missing, captions.sha256)


def summarise(scores: Tensor, styles: Sequence[str], info: RewardInfo, chunk: int = 80) -> StyleSummary:
    """Summarise scores (images,) as the official script prints them: cosines times 100.

    Args:
        scores: of the images.
        styles: of the images.
        info: what the scores mean.
        chunk: captions whose mean counts as one in the deviation.
    """
    factor = 100.0 if info.unit.startswith("cosine") else 1.0
    by_style: Mapping[str, list[float]] = {
        style: [factor * value for value, of in zip(scores.tolist(), styles, strict=True) if of == style]
        for style in dict.fromkeys(styles)
    }
    return style_summary(by_style, chunk)
