"""How far annotators agree: Krippendorff's alpha for nominal data, and what else shows whether votes can be trusted.

Alpha is used because it takes any number of annotators, each of whom may have left tasks out; Cohen's kappa takes two
and Fleiss' kappa the same number for every task. Source: Krippendorff, "Content Analysis", 4th ed., 2018, chapter 12.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffalign.label.tasks import Task
from diffalign.label.votes import Mode, Vote

if TYPE_CHECKING:
    from diffalign.evaluation.winrate import Estimate


def krippendorff_alpha(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Return Krippendorff's alpha for nominal values.

    Args:
        units: for each thing judged, the values it was given, one an annotator; those with fewer than two say nothing
            about agreement and are left out.

    Returns:
        1 for perfect agreement, 0 for what chance gives, below 0 for less; None where it is not defined: no two
        annotators judged the same thing, or only one value was ever given.
    """
    pairable = [Counter(values) for values in units if len(values) > 1]
    totals: Counter[Hashable] = sum(pairable, Counter())
    n = totals.total()
    observed = sum(
        (unit.total() ** 2 - sum(count * count for count in unit.values())) / (unit.total() - 1) for unit in pairable
    )
    expected = n * n - sum(count * count for count in totals.values())
    return 1 - (n - 1) * observed / expected if expected else None


def raw_agreement(units: Iterable[Sequence[Hashable]]) -> float | None:
    """Return the share of pairs of annotators that gave the same value, over all things judged by two or more."""
    same = pairs = 0
    for unit in map(Counter, units):
        pairs += unit.total() * (unit.total() - 1)
        same += sum(count * (count - 1) for count in unit.values())
    return same / pairs if pairs else None


@dataclass(frozen=True)
class AgreementReport:
    """What the votes of a session look like.

    Args:
        verdicts: annotator -> verdict -> number of votes.
        shared: things judged by two annotators or more: tasks when comparing, images when tagging.
        alpha: Krippendorff's, nominal; None where undefined.
        raw: share of agreeing pairs of annotators.
        leftmost: share of choices that fell on the image shown leftmost, with its interval; None without choices.
        by_chance: what that share would be if place did not matter.
        seconds: median time of an answer.
    """

    verdicts: dict[str, Counter[str]]
    shared: int
    alpha: float | None
    raw: float | None
    leftmost: Estimate | None
    by_chance: float
    seconds: float

    def lines(self) -> list[str]:
        """Return the report as lines of text."""
        lines = []
        for annotator, verdicts in sorted(self.verdicts.items()):
            parts = ", ".join(f"{count} {verdict}" for verdict, count in sorted(verdicts.items()))
            lines.append(f"{annotator}: {verdicts.total()} votes ({parts})")
        if self.raw is None:
            lines.append("agreement: nothing was judged by two annotators yet")
        else:
            alpha = "undefined, only one value was ever given" if self.alpha is None else f"{self.alpha:.3f}"
            lines.append(
                f"agreement over {self.shared} shared judgements: Krippendorff's alpha (nominal) {alpha}; "
                f"pairs of annotators that agree {self.raw:.1%}"
            )
        if self.leftmost is not None:
            share = self.leftmost
            lines.append(
                f"leftmost image chosen: {share.value:.1%} [{share.low:.1%}, {share.high:.1%}], by chance "
                f"{self.by_chance:.1%}"
            )
        lines.append(f"median time of an answer: {self.seconds:.1f} s")
        return lines


def agreement(votes: Sequence[Vote], tasks: Sequence[Task], mode: Mode) -> AgreementReport:
    """Summarise votes, the last of each annotator and task; skipped tasks count as not judged.

    Comparing, the value of a task is the image chosen, or a tie. Tagging, the value of each image is whether it was
    tagged with any defect.
    """
    sizes = {task.id: len(task.images) for task in tasks}
    verdicts: dict[str, Counter[str]] = defaultdict(Counter)
    judged: dict[Hashable, list[Hashable]] = defaultdict(list)
    for vote in votes:
        verdicts[vote.annotator][vote.verdict] += 1
        if vote.verdict == "skip":
            continue
        if mode == "compare":
            judged[vote.task].append(vote.choice)
        else:
            for index in range(sizes[vote.task]):
                judged[vote.task, index].append(bool(vote.tags.get(index)))
    values = list(judged.values())
    choices = [(vote.position == 0, 1 / sizes[vote.task]) for vote in votes if vote.choice is not None]
    seconds = sorted(vote.seconds for vote in votes)
    return AgreementReport(
        verdicts=dict(verdicts),
        shared=sum(len(unit) > 1 for unit in values),
        alpha=krippendorff_alpha(values),
        raw=raw_agreement(values),
        leftmost=_share([left for left, _ in choices]) if choices else None,
        by_chance=sum(chance for _, chance in choices) / len(choices) if choices else 0.0,
        seconds=seconds[len(seconds) // 2] if seconds else 0.0,
    )


def _share(outcomes: Sequence[bool]) -> Estimate:
    """Return the share of true outcomes with its Wilson interval."""
    import torch

    from diffalign.evaluation.winrate import win_rate

    hits = torch.tensor(outcomes, dtype=torch.float64)
    return win_rate(hits, torch.full_like(hits, 0.5))
