"""GenEval's summary: accuracy of each task over images, and their plain mean."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffalign.evaluation.accuracy import Accuracy
from diffalign.evaluation.geneval.vocabulary import TAGS


@dataclass(frozen=True)
class Summary:
    """The official figures.

    Args:
        tasks: task -> its score.
        images, correct_images: all together.
        prompts, correct_prompts: captions, and those with at least one correct image.
    """

    tasks: Mapping[str, Accuracy]
    images: int
    correct_images: int
    prompts: int
    correct_prompts: int

    @property
    def overall(self) -> float:
        """Mean of the tasks' accuracies (not of the images)."""
        return sum(task.accuracy for task in self.tasks.values()) / len(self.tasks)

    def as_dict(self) -> dict[str, Any]:
        """Return what summary files hold."""
        return {
            "overall": self.overall,
            "tasks": {
                name: {"accuracy": task.accuracy, "correct": task.correct, "total": task.total}
                for name, task in self.tasks.items()
            },
            "images": self.images,
            "correct_images": self.correct_images,
            "prompts": self.prompts,
            "correct_prompts": self.correct_prompts,
        }

    def as_text(self) -> str:
        """Return the figures as lines for a reader."""
        lines = [
            f"{name:<14} {task.accuracy:7.2%}  ({task.correct} of {task.total})" for name, task in self.tasks.items()
        ]
        lines.append(
            f"{'images':<14} {self.correct_images / self.images:7.2%}  ({self.correct_images} of {self.images})"
        )
        lines.append(
            f"{'prompts':<14} {self.correct_prompts / self.prompts:7.2%}  ({self.correct_prompts} of {self.prompts} "
            "with a correct image)"
        )
        lines.append(f"{'overall':<14} {self.overall:.5f}  (mean of the tasks)")
        return "\n".join(lines) + "\n"


def summarise(results: Sequence[Mapping[str, Any]]) -> Summary:
    """Summarise rows of ``results.jsonl``.

    Args:
        results: at least one; ``tag``, ``correct`` and ``metadata`` (the caption's row as JSON text) are read. Images
            with the same metadata belong to one caption.
    """
    tags = {str(row["tag"]) for row in results}
    tasks = {}
    for tag in [*(t for t in TAGS if t in tags), *sorted(tags - set(TAGS))]:
        verdicts = [bool(row["correct"]) for row in results if row["tag"] == tag]
        tasks[tag] = Accuracy(sum(verdicts), len(verdicts))
    captions: dict[str, bool] = {}
    for row in results:
        text = row["metadata"] if isinstance(row["metadata"], str) else json.dumps(row["metadata"])
        captions[text] = captions.get(text, False) or bool(row["correct"])
    return Summary(
        tasks, len(results), sum(task.correct for task in tasks.values()), len(captions), sum(captions.values())
    )
