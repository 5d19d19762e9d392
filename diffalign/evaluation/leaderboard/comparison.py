"""A row against its base: paired by caption and initial noise, intervals over training seeds and captions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.evaluation.leaderboard.cells import FINISHED
from diffalign.evaluation.leaderboard.entries import Entry
from diffalign.evaluation.winrate import Estimate, bootstrap_mean, wins
from diffalign.world.evaluation import PROXY

_COLLAPSED = 0.5
"""Share of the base's verifier score below which a row has collapsed."""


@dataclass(frozen=True)
class Row:
    """A row over its training seeds; differences are those of the same captions and initial noises of the base.

    Args:
        name: of the row.
        entry: what it is.
        seeds: number of training seeds with scores.
        early: outcomes of the others: why they ended early.
        win_rate: by the proxy reward, against the base.
        means: mean score by reward.
        changes: mean paired difference to the base by reward.
        reward: what the runs aimed at, as text; empty where they had no reward.
        own: that reward before and after, and its paired difference.
        by_kind: verifier score for each kind of caption.
        train_seconds, train_images: means.
        curves: of each seed's run: (step, seconds, images, reward).
        older: some of its cells were measured with code that has changed since.
    """

    name: str
    entry: Entry
    seeds: int
    early: Sequence[str] = ()
    win_rate: Estimate | None = None
    means: Mapping[str, float] = field(default_factory=dict)
    changes: Mapping[str, Estimate] = field(default_factory=dict)
    reward: str = ""
    own: tuple[float, float, Estimate] | None = None
    by_kind: Mapping[str, float] = field(default_factory=dict)
    train_seconds: float = 0.0
    train_images: float = 0.0
    curves: Sequence[Sequence[Sequence[float]]] = ()
    older: bool = False

    @property
    def is_start(self) -> bool:
        """Whether the row is the base itself, which is compared with nothing."""
        return self.name == self.entry.base

    @property
    def verdict(self) -> str:
        """What the intervals allow to say, of the row's own reward or else of the win rate."""
        if self.is_start:
            return "the start"
        runs = self.seeds + len(self.early)
        early = [f"{self.early.count(why)} of {runs} {why}" for why in dict.fromkeys(self.early)]
        if self.win_rate is None:
            return "; ".join(early)
        if self.own is not None:
            change = self.own[2]
            low, high = change.low, change.high
        else:
            low, high = self.win_rate.low - 0.5, self.win_rate.high - 0.5
        said = ["rises" if low > 0 else "falls" if high < 0 else "undecided"]
        verifier = self.changes["verifier"]
        if self.means["verifier"] < _COLLAPSED * (self.means["verifier"] - verifier.value):
            said.append("collapsed")
        elif verifier.high < 0:
            said.append("verifier lowered")
        return "; ".join([*said, *early])


def compare(
    name: str, entry: Entry, runs: Sequence[Mapping[str, Any]], base: Mapping[str, Any], older: bool = False
) -> Row:
    """Summarise the cells of a row.

    Args:
        name, entry: the row.
        runs: contents of its cells, one a training seed.
        base: content of the cell that they are compared with.
        older: some cell was measured with code that has changed since.
    """
    scored = [run for run in runs if run["outcome"] == FINISHED]
    if name == entry.base:
        scored = [_first_draw(run) for run in scored]
    common: dict[str, Any] = {
        "name": name,
        "entry": entry,
        "seeds": len(scored),
        "early": [run["outcome"] for run in runs if run["outcome"] != FINISHED],
        "train_seconds": _mean([run["train_seconds"] for run in runs]),
        "train_images": _mean([run["train_images"] for run in runs]),
        "curves": [run["curve"] for run in runs if run["curve"]],
        "reward": " + ".join(name if w == 1 else f"{w:g} {name}" for name, w in runs[0]["rewards"].items()),
        "older": older,
    }
    if not scored:
        return Row(**common)
    measured = [reward for reward in base["scores"] if all(reward in run["scores"] for run in scored)]
    pairs = {reward: [_paired(run, base, reward) for run in scored] for reward in measured}
    changes = {reward: _by_caption([after - before for before, after in pairs[reward]]) for reward in pairs}
    verdicts = torch.stack([after.mean(0) for _, after in pairs["verifier"]])
    kinds = {kind: [i for i, k in enumerate(base["kinds"]) if k == kind] for kind in sorted(set(base["kinds"]))}
    outcomes = [wins(after, before) for before, after in pairs[PROXY]]
    return Row(
        **common,
        win_rate=bootstrap_mean(_by_caption(outcomes)).of(torch.cat([run.flatten() for run in outcomes])),
        means={reward: _mean([after.mean().item() for _, after in pairs[reward]]) for reward in pairs},
        changes={reward: bootstrap_mean(values) for reward, values in changes.items()},
        own=_own(scored, pairs),
        by_kind={kind: verdicts[:, index].mean().item() for kind, index in kinds.items()},
    )


def _own(
    runs: Sequence[Mapping[str, Any]], pairs: Mapping[str, Sequence[tuple[Tensor, Tensor]]]
) -> tuple[float, float, Estimate] | None:
    """The weighted sum of the rewards that the runs aimed at: before, after, paired difference."""
    weights: Mapping[str, float] = runs[0]["rewards"]
    if not weights:
        return None

    def total(run: int, side: int) -> Tensor:
        return torch.stack([weight * pairs[name][run][side] for name, weight in weights.items()]).sum(0)

    before, after = (_by_caption([total(run, side) for run in range(len(runs))]) for side in (0, 1))
    return before.mean().item(), after.mean().item(), bootstrap_mean(after - before)


def _first_draw(run: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a base is shown by: the table it stands in holds rows of one draw."""
    count = len(run["kinds"])
    return {**run, "draws": 1, "scores": {name: values[:count] for name, values in run["scores"].items()}}


def _paired(run: Mapping[str, Any], base: Mapping[str, Any], reward: str) -> tuple[Tensor, Tensor]:
    """Scores (draws, captions) of the base and of a run from the initial noises that both have."""
    draws = min(run["draws"], base["draws"])
    before, after = (
        torch.tensor(cell["scores"][reward], dtype=torch.float64).reshape(cell["draws"], -1)[:draws]
        for cell in (base, run)
    )
    return before, after


def _by_caption(runs: Sequence[Tensor]) -> Tensor:
    """Mean over the draws of each caption, (runs, captions): the draws of a caption are no independent evidence."""
    return torch.stack([run.mean(0) for run in runs])


def _mean(values: Sequence[float]) -> float:
    return sum(values) / max(1, len(values))
