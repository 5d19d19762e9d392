"""Images of given noise, what rewards say of them, and the best of each prompt so far."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import Metadata
from diffalign.rewards.combine import WeightedSum

Generate = Callable[[Tensor, Sequence[int]], Tensor]
"""(noise (rows, channels, ...), index of each row's prompt) -> images (rows, 3, height, width) in [0, 1], with a graph
where one is recorded. The same noise and prompt always give the same image."""


@dataclass(frozen=True)
class Look:
    """Images of some prompts at one iteration.

    Args:
        iteration: from 0, the plain generation.
        rows: index of each row's prompt.
        noise: (rows, channels, ...) that was generated from.
        images: (rows, 3, height, width) in [0, 1].
        scores: reward -> (rows,), unweighted.
        totals: (rows,) weighted sums.
        improved: (rows,) bool, whether it is the best image of its prompt so far; known once it was compared.
    """

    iteration: int
    rows: Sequence[int]
    noise: Tensor
    images: Tensor
    scores: Mapping[str, Tensor]
    totals: Tensor
    improved: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))


@dataclass
class Found:
    """The best image of a prompt.

    Args:
        noise: (channels, ...) that it comes from.
        image: (3, height, width) in [0, 1], on the CPU.
        total: its weighted reward.
        iteration: that found it; 0 is the start.
        first_image: of iteration 0.
        history: reward, and "total", -> its value in every iteration made.
    """

    noise: Tensor = field(default_factory=lambda: torch.empty(0))
    image: Tensor = field(default_factory=lambda: torch.empty(0))
    total: float = -math.inf
    iteration: int = 0
    first_image: Tensor = field(default_factory=lambda: torch.empty(0))
    history: dict[str, list[float]] = field(default_factory=dict)

    @property
    def generations(self) -> int:
        """Images that were made."""
        return len(self.history.get("total", ()))


@dataclass
class Judge:
    """Generates, scores and remembers the best.

    Args:
        generate: the frozen generator.
        reward: rewards with their weights.
        prompts: one a search.
        metadata: one a prompt, for rewards that need it.
        found: the best of each prompt so far.
    """

    generate: Generate
    reward: WeightedSum
    prompts: Sequence[str]
    metadata: Metadata | None = None
    found: list[Found] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.found = self.found or [Found() for _ in self.prompts]

    def look(self, noise: Tensor, rows: Sequence[int], iteration: int) -> Look:
        """Generate and score, with a graph where one is recorded.

        Raises:
            UserError: if a reward is not finite.
        """
        images = self.generate(noise, rows)
        metadata = None if self.metadata is None else [self.metadata[row] for row in rows]
        scores = self.reward.score_parts(images, [self.prompts[row] for row in rows], metadata)
        for name, values in scores.items():
            if not values.isfinite().all():
                row = rows[int((~values.isfinite()).nonzero()[0])]
                raise UserError(
                    f"reward {name!r} is not finite for {self.prompts[row]!r} at iteration {iteration}: half precision "
                    "overflows in many VAEs; load the model in float32 or bfloat16, or lower the learning rate"
                )
        totals = torch.stack([self.reward.weights[name] * values for name, values in scores.items()]).sum(0)
        return Look(iteration, list(rows), noise, images, scores, totals)

    def keep(self, look: Look) -> Look:
        """Enter a look in the histories, keep what is better; return it without its graph.

        What was entered at an iteration stays: looking again changes nothing.
        """
        scores = {name: values.detach() for name, values in look.scores.items()}
        totals = look.totals.detach()
        best = torch.tensor([self.found[row].total for row in look.rows], dtype=torch.float64)
        seen = replace(
            look,
            noise=look.noise.detach(),
            images=look.images.detach(),
            scores=scores,
            totals=totals,
            improved=totals.double().cpu() > best,
        )
        columns = {name: values.tolist() for name, values in {**scores, "total": totals}.items()}
        for place, row in enumerate(look.rows):
            found = self.found[row]
            if found.generations > look.iteration:
                continue
            for name, values in columns.items():
                found.history.setdefault(name, []).append(values[place])
            if look.iteration == 0:
                found.first_image = seen.images[place].float().cpu().clone()
            if seen.improved[place]:
                found.noise, found.image = seen.noise[place].clone(), seen.images[place].float().cpu().clone()
                found.total, found.iteration = columns["total"][place], look.iteration
        return seen


def parts_of(rows: Sequence[int], max_rows: int) -> list[list[int]]:
    """Split rows into passes of at most ``max_rows``; 0 for one pass."""
    size = max_rows or max(len(rows), 1)
    return [list(rows[start : start + size]) for start in range(0, len(rows), size)]


def best_of_noises(judge: Judge, noise: Callable[[int], Tensor], count: int, max_rows: int = 0) -> list[Found]:
    """Keep the best image of ``count`` noises for each prompt: what a search of as many iterations must beat.

    Args:
        judge: of the prompts.
        noise: number of the draw -> (prompts, channels, ...); draw 0 is where a search would start.
        count: images of each prompt.
        max_rows: rows in one pass; 0 for all.

    Raises:
        UserError: if a reward is not finite.
    """
    for draw in range(count):
        drawn = noise(draw)
        for rows in parts_of(range(len(judge.prompts)), max_rows):
            with torch.no_grad():
                judge.keep(judge.look(drawn[rows], rows, draw))
    return judge.found
