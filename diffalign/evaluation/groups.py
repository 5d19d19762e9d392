"""Scores by group of captions: the categories and challenges of PartiPrompts, the tags of GenEval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from diffalign.errors import UserError
from diffalign.evaluation.comparison import Comparison, Key
from diffalign.evaluation.winrate import Estimate
from diffalign.rewards.scoring import Item


@dataclass(frozen=True)
class Group:
    """Scores of a group.

    Args:
        name: of the group.
        images: how many.
        mean: of their scores.
        win_rate: over a baseline, with its 95 % interval; None without one.
    """

    name: str
    images: int
    mean: float
    win_rate: Estimate | None = None

    def __str__(self) -> str:
        rate = "" if self.win_rate is None else f", win rate {self.win_rate}"
        return f"{self.name}: mean {self.mean:.4f} of {self.images}{rate}"

    def as_dict(self) -> dict[str, Any]:
        """Return what summary files hold."""
        return asdict(self)


def group_scores(
    keys: Sequence[Key], items: Sequence[Item], columns: Sequence[str], scores: Tensor, baseline: Tensor | None = None
) -> dict[str, list[Group]]:
    """Summarise scores by the values of columns of the captions' metadata.

    Args:
        keys, items: the images.
        columns: names in the metadata.
        scores: (images,).
        baseline: (images,) of another model on the same captions.

    Returns:
        column -> its groups, the largest first.

    Raises:
        UserError: if a caption lacks a column.
    """
    tables: dict[str, list[Group]] = {}
    for column in columns:
        members: dict[str, list[int]] = {}
        for index, item in enumerate(items):
            if item.metadata is None or column not in item.metadata:
                raise UserError(f"the caption of {item.image} has no {column!r}; draw images from a file with groups")
            members.setdefault(str(item.metadata[column]), []).append(index)
        tables[column] = [
            Group(
                name,
                len(index),
                scores[index].double().mean().item(),
                None
                if baseline is None
                else Comparison([keys[i] for i in index], scores[index], baseline[index]).rate(),
            )
            for name, index in sorted(members.items(), key=lambda pair: (-len(pair[1]), pair[0]))
        ]
    return tables
