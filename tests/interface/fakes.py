"""Tiny stand-ins for the methods that ask most of the interface, each with its own formula written down at once.

Here are those that differ in their losses and statistics; ``run_fakes`` holds those that shape the run itself.

``direct`` of a fake returns the parameters after the updates of one epoch of plain gradient descent, computed from all
examples together without the loop: what the loop must arrive at whatever the split.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.batch import Batch
from diffalign.strategies.base import Context, LossOutput, Piece, Reduce, Spec, Strategy, Terms
from tests.interface.toy import DTYPE, START, features, toy_batch

LEARNING_RATE = 0.1
UPDATES = ([0, 1, 2, 3], [4])
"""Examples of the two updates of an epoch; the second leaves a second process without any."""


@dataclass(frozen=True)
class NoConfig:
    """Nothing to configure."""


class Fake(Strategy):
    """What most fakes share: values of the policy on features drawn from the seeds."""

    spec = Spec(data="prompts", needs_reference=False)
    Config = NoConfig
    shape: tuple[int, ...] = (1,)

    def __init__(self) -> None:
        self.config = NoConfig()

    def draw(self, ctx: Context, batch: Batch) -> Tensor:
        return features(batch, *self.shape)

    def pieces(self, ctx: Context, batch: Batch, draws: Any) -> list[Piece]:
        return [Piece()]

    def frozen(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Mapping[str, Tensor]:
        return {}

    def terms(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Tensor:
        return ctx.policy.value(draws)

    def direct(self) -> dict[str, Tensor]:
        theta = torch.tensor(START, dtype=DTYPE)
        for indices in UPDATES:
            batch = toy_batch(indices)
            theta = descend(theta, lambda t, batch=batch: self.objective(t, batch))
        return {"default": theta}

    def objective(self, theta: Tensor, batch: Batch) -> Tensor:
        """The method's formula on one whole update."""
        raise TypeError(f"{type(self).__name__} writes down its epoch, not one update")


def descend(theta: Tensor, objective: Any) -> Tensor:
    """One step of gradient descent."""
    theta = theta.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(theta), theta)
    return (theta - LEARNING_RATE * gradient).detach()


class PolicyInDraw(Fake):
    """InPO, SmPO: the policy, in eval mode and without gradient, decides where it is trained."""

    def draw(self, ctx: Context, batch: Batch) -> Tensor:
        assert not torch.is_grad_enabled()
        assert not ctx.policy.module.training
        noise = features(batch, 1, stream="noise")
        return noise + ctx.policy.value(noise)[..., None]

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        return LossOutput((terms.policy - 1).square().mean())

    def objective(self, theta: Tensor, batch: Batch) -> Tensor:
        noise = features(batch, 1, stream="noise")
        return ((noise + (noise @ theta.detach())[..., None]) @ theta - 1).square().mean()


class PathInPieces(Fake):
    """Inversion-DPO, PRDP: the loss joins the steps of a path, whose graphs exist one at a time."""

    spec = Spec(data="prompts", needs_reference=False, piece_dim=1)
    shape = (3,)

    def pieces(self, ctx: Context, batch: Batch, draws: Tensor) -> list[Piece]:
        return [Piece(columns=step) for step in range(3)]

    def terms(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Tensor:
        assert piece.columns is not None
        return ctx.policy.value(draws[:, piece.columns : piece.columns + 1])

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        return LossOutput(F.softplus(terms.policy.sum(dim=1)).mean())

    def objective(self, theta: Tensor, batch: Batch) -> Tensor:
        return F.softplus((features(batch, 3) @ theta).sum(dim=1)).mean()


class RankedRows(Fake):
    """RankDPO on long lists: N images an example in block order, rows in pieces that cut through examples."""

    def draw(self, ctx: Context, batch: Batch) -> Tensor:
        return features(batch, 4).transpose(0, 1).reshape(4 * batch.size, 1, 2)

    def pieces(self, ctx: Context, batch: Batch, draws: Tensor) -> list[Piece]:
        return [Piece(rows=slice(start, start + 3)) for start in range(0, len(draws), 3)]

    def terms(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Tensor:
        return ctx.policy.value(draws[piece.rows])

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        values = terms.policy.reshape(4, batch.size)
        return LossOutput(-values.log_softmax(dim=0)[0].mean())

    def objective(self, theta: Tensor, batch: Batch) -> Tensor:
        return -(features(batch, 4) @ theta).log_softmax(dim=1)[:, 0].mean()


class StatisticOverUpdate(Fake):
    """KTO, TKTO: the reference point is a mean over the whole update and all processes."""

    spec = Spec(data="prompts", needs_reference=False, statistics="update")

    def statistics(self, terms: Terms, reduce: Reduce) -> Mapping[str, Tensor]:
        assert not terms.policy.requires_grad
        count = reduce(torch.tensor(float(len(terms.policy)), dtype=DTYPE))
        return {"point": reduce(terms.policy.sum()) / count}

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        sign = 2 * batch.fields["label"] - 1
        return LossOutput(-torch.sigmoid(sign * (terms.policy[:, 0] - statistics["point"])).mean())

    def objective(self, theta: Tensor, batch: Batch) -> Tensor:
        values = features(batch, 1) @ theta
        sign = 2 * batch.fields["label"] - 1
        return -torch.sigmoid(sign * (values[:, 0] - values.mean().detach())).mean()


class StatisticOverMicroBatch(StatisticOverUpdate):
    """KTO as published: the reference point is that of one micro-batch on all processes."""

    spec = Spec(data="prompts", needs_reference=False, statistics="micro_batch")

    def objective(self, theta: Tensor, batch: Batch) -> Tensor:
        # two rows at a time: one micro-batch of two, or one of one on each of two processes
        total = torch.zeros((), dtype=DTYPE)
        indices = [int(name.rsplit("-", 1)[1]) for name in batch.ids]
        for start in range(0, len(indices), 2):
            part = toy_batch(indices[start : start + 2])
            total = total + super().objective(theta, part) * part.size
        return total / batch.size


class RunningStatistic(StatisticOverUpdate):
    """BCO: a running mean that lives as long as the run and is part of its checkpoints."""

    def __init__(self) -> None:
        super().__init__()
        self.running = torch.zeros((), dtype=DTYPE)

    def statistics(self, terms: Terms, reduce: Reduce) -> Mapping[str, Tensor]:
        self.running = 0.5 * self.running + 0.5 * super().statistics(terms, reduce)["point"]
        return {"point": self.running}

    def state_dict(self) -> dict[str, Any]:
        return {"running": self.running}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.running = state["running"]

    def direct(self) -> dict[str, Tensor]:
        theta, running = torch.tensor(START, dtype=DTYPE), torch.zeros((), dtype=DTYPE)
        for indices in UPDATES:
            batch = toy_batch(indices)
            x, sign = features(batch, 1), 2 * batch.fields["label"] - 1
            running = 0.5 * running + 0.5 * (x @ theta).mean()
            theta = descend(theta, lambda t, x=x, s=sign, r=running: -torch.sigmoid(s * ((x @ t)[:, 0] - r)).mean())
        return {"default": theta}


class MaskedColumns(Fake):
    """TGDPO, DenseDPO, RTO: a row of values an example, of lengths that differ between examples."""

    spec = Spec(data="prompts", needs_reference=False, statistics="update")

    @staticmethod
    def lengths(batch: Batch) -> Tensor:
        return torch.tensor([1 + int(name.rsplit("-", 1)[1]) % 3 for name in batch.ids])

    def draw(self, ctx: Context, batch: Batch) -> Tensor:
        return features(batch, 3)[:, : int(self.lengths(batch).max())]

    def frozen(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Mapping[str, Tensor]:
        return {"mask": (torch.arange(draws.shape[1]) < self.lengths(batch)[:, None]).to(DTYPE)}

    def statistics(self, terms: Terms, reduce: Reduce) -> Mapping[str, Tensor]:
        assert terms.mask is not None
        return {"mean": reduce((terms.policy * terms.mask).sum()) / reduce(terms.mask.sum())}

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        assert terms.mask is not None
        gaps = (terms.policy - statistics["mean"]).square() * terms.mask
        return LossOutput((gaps.sum(dim=1) / terms.mask.sum(dim=1)).mean())

    def objective(self, theta: Tensor, batch: Batch) -> Tensor:
        values = features(batch, 3) @ theta
        mask = (torch.arange(3) < self.lengths(batch)[:, None]).to(DTYPE)
        mean = ((values * mask).sum() / mask.sum()).detach()
        return (((values - mean).square() * mask).sum(dim=1) / mask.sum(dim=1)).mean()


class OtherPolicies(Fake):
    """MODPO, TGDPO: further frozen policies by name, and numbers that came with the example."""

    spec = Spec(data="prompts", needs_reference=False, frozen_policies=("margin",))

    def frozen(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Mapping[str, Tensor]:
        return {"margin": ctx.frozen_policies["margin"].value(draws), "label": batch.fields["label"][:, None]}

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        logits = terms.policy + terms.frozen["margin"] + terms.frozen["label"]
        return LossOutput(-F.logsigmoid(logits).mean(), {"logit": logits[:, 0].detach()})

    def objective(self, theta: Tensor, batch: Batch) -> Tensor:
        x, margin = features(batch, 1), torch.tensor(START, dtype=DTYPE)
        return -F.logsigmoid(x @ theta + x @ margin + batch.fields["label"][:, None]).mean()
