"""Fakes that shape the run itself: roll-outs, moving references, adapters and parameters of their own."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.batch import Batch
from diffalign.strategies.base import Context, LossOutput, ParameterGroup, Piece, Spec, Terms, Update
from tests.interface.fakes import (
    LEARNING_RATE,
    UPDATES,
    Fake,
    MaskedColumns,
    OtherPolicies,
    PathInPieces,
    PolicyInDraw,
    RankedRows,
    RunningStatistic,
    StatisticOverMicroBatch,
    StatisticOverUpdate,
    descend,
)
from tests.interface.toy import DTYPE, START, features, toy_batch


class Rollout(Fake):
    """DDPO, GRPO: a rollout becomes several updates; examples without advantage are dropped, the denominator stays."""

    def collect(self, ctx: Context, batches: Sequence[Batch]) -> Iterable[Update]:
        if not batches:
            return  # fewer updates than on other processes: the loop must balance that
        kept = [b for batch in batches if (b := self._kept(batch)).size]
        planned = float(sum(batch.size for batch in batches))
        for inner in range(2):
            yield Update([replace(b, fields={**b.fields, "inner": inner}) for b in kept], weight=planned)

    def draw(self, ctx: Context, batch: Batch) -> Tensor:
        return features(batch, 1, stream=f"inner {batch.fields['inner']}")

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        return LossOutput(terms.policy.exp().mean())

    def direct(self) -> dict[str, Tensor]:
        theta = torch.tensor(START, dtype=DTYPE)
        for indices in UPDATES:
            kept = self._kept(toy_batch(indices))
            for inner in range(2 if kept.size else 0):
                x, count = features(kept, 1, stream=f"inner {inner}"), len(indices)
                theta = descend(theta, lambda t, x=x, n=count: (x @ t).exp().sum() / n)
        return {"default": theta}

    @staticmethod
    def _kept(batch: Batch) -> Batch:
        rows = [row for row, label in enumerate(batch.fields["label"].tolist()) if label]
        return Batch([batch.ids[r] for r in rows], batch.seeds[rows], fields={"label": batch.fields["label"][rows]})


class Pool(Fake):
    """SePPO, DRO: slots made in ``build`` receive copies of the policy and serve as a moving reference."""

    def build(self, ctx: Context) -> None:
        ctx.policy.adapters.add("slot", trainable=False)

    def frozen(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Mapping[str, Tensor]:
        with ctx.policy.adapters.using("slot"):
            return {"reference": ctx.policy.value(draws)}

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        return LossOutput(F.softplus(-(terms.policy - terms.reference)).mean())

    def after_step(self, ctx: Context) -> None:
        ctx.policy.adapters.copy("default", "slot")

    def direct(self) -> dict[str, Tensor]:
        theta = slot = torch.tensor(START, dtype=DTYPE)
        for indices in UPDATES:
            x, old = features(toy_batch(indices), 1), slot
            theta = descend(theta, lambda t, x=x, old=old: F.softplus(-(x @ t - x @ old)).mean())
            slot = theta
        return {"default": theta, "slot": slot}


class TwoAdapters(Fake):
    """OFS-DPO: two trainable adapters in one loss, each run forward and backward under its own."""

    spec = Spec(data="prompts", needs_reference=False, piece_dim=1)

    def build(self, ctx: Context) -> None:
        ctx.policy.adapters.add("fast", value=(0.5, 0.1))
        ctx.policy.adapters.add("slow", value=(-0.2, 0.4))

    def pieces(self, ctx: Context, batch: Batch, draws: Tensor) -> list[Piece]:
        return [Piece(columns=0, adapter="fast"), Piece(columns=1, adapter="slow")]

    def terms(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Tensor:
        assert ctx.policy.adapters.active == piece.adapter
        return ctx.policy.value(draws)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        fast, slow = terms.policy.unbind(dim=1)
        return LossOutput(F.softplus(slow - fast).mean() + slow.square().mean())

    def direct(self) -> dict[str, Tensor]:
        both = torch.tensor([[0.5, 0.1], [-0.2, 0.4]], dtype=DTYPE)

        def objective(both: Tensor, x: Tensor) -> Tensor:
            fast, slow = (x @ both.T).unbind(dim=1)
            return F.softplus(slow - fast).mean() + slow.square().mean()

        for indices in UPDATES:
            x = features(toy_batch(indices), 1)[:, 0]
            both = descend(both, lambda b, x=x: objective(b, x))
        return {"default": torch.tensor(START, dtype=DTYPE), "fast": both[0], "slow": both[1]}


class TrainsNoise(Fake):
    """ReNO: a noise vector an example is trained, clipped row by row; the best one seen, step 0 included, is kept."""

    spec = Spec(data="prompts", needs_reference=False, trains="own")
    clip = 0.05

    def build(self, ctx: Context) -> None:
        self.noise = torch.nn.Parameter(features(toy_batch(range(5)), stream="start"))
        self.best = torch.full((5,), -torch.inf, dtype=DTYPE)

    def parameters(self) -> list[ParameterGroup]:
        return [ParameterGroup([self.noise], clip="per_row")]

    def terms(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Tensor:
        rows = [int(name.rsplit("-", 1)[1]) for name in batch.ids]
        values = ctx.policy.value(self.noise[rows])
        self.best[rows] = torch.maximum(self.best[rows], values.detach())
        return values[:, None]

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        return LossOutput(-terms.policy.mean())

    def export(self, ctx: Context, folder: Path) -> None:
        (folder / "noise.json").write_text(json.dumps(self.noise.tolist()))

    def direct(self) -> dict[str, Tensor]:
        noise, theta = features(toy_batch(range(5)), stream="start"), torch.tensor(START, dtype=DTYPE)
        for indices in UPDATES:
            gradient = -theta / len(indices)
            gradient = gradient * min(1.0, self.clip / float(gradient.norm()))
            noise[indices] -= LEARNING_RATE * gradient
        return {"default": theta, "own": noise}


class DifferentiableRollout(Fake):
    """AlignProp, DRaFT, ReFL: sampling itself is inside the graph, and a reward is what is improved."""

    def terms(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Tensor:
        x = draws[:, 0]
        for _ in range(2):
            x = x + 0.3 * torch.tanh(ctx.policy.value(x))[:, None]
        return ctx.rewards["sum"](x)[:, None]

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        return LossOutput(-terms.policy.mean())

    def objective(self, theta: Tensor, batch: Batch) -> Tensor:
        x = features(batch, 1)[:, 0]
        for _ in range(2):
            x = x + 0.3 * torch.tanh(x @ theta)[:, None]
        return -x.sum(dim=1).mean()


FAKES: dict[str, type[Fake]] = {
    fake.__name__: fake
    for fake in (
        PolicyInDraw,
        PathInPieces,
        RankedRows,
        Rollout,
        Pool,
        StatisticOverUpdate,
        StatisticOverMicroBatch,
        RunningStatistic,
        TwoAdapters,
        MaskedColumns,
        OtherPolicies,
        TrainsNoise,
        DifferentiableRollout,
    )
}
