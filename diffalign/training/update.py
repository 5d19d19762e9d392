"""The gradient of one update: the loop's side of the contract in ``diffalign.strategies.base``.

With examples ``i`` of all micro-batches and processes and ``W`` their number, the gradient is that of
``(1 / W) sum_i loss_i``; neither the split into micro-batches nor the number of processes changes it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.batch import Batch
from diffalign.diffusion.random import derive_seed
from diffalign.strategies.base import Context, LossOutput, Piece, Strategy, Terms, Update
from diffalign.training.processes import Processes, sum_gradients
from diffalign.training.sharding import gathered, is_sharded, networks_of
from diffalign.training.stopwatch import Stopwatch


@dataclass
class Account:
    """Result of an update, on this process; nothing here has left the device.

    Args:
        weight: number by which the summed loss of all processes was divided: their examples, where none was dropped.
        sums: metric -> sum over this process's examples, "loss" among them.
        examples: this process's number of examples.
        micro_batches: ids, loss and policy terms of each micro-batch, to name those that went wrong.
    """

    weight: float
    sums: dict[str, Tensor] = field(default_factory=dict)
    examples: int = 0
    micro_batches: list[tuple[Sequence[str], Tensor, Tensor]] = field(default_factory=list)

    def add(self, batch: Batch, output: LossOutput, terms: Tensor) -> None:
        """Enter a micro-batch."""
        for name, value in {"loss": output.loss, **output.metrics}.items():
            value = value.detach().float()
            total = value.sum() if value.dim() else value * batch.size
            self.sums[name] = self.sums[name] + total if name in self.sums else total
        self.examples += batch.size
        self.micro_batches.append((batch.ids, output.loss.detach(), terms.detach()))

    def offenders(self) -> list[str]:
        """Names of the examples whose terms are not finite; all of a micro-batch where only its loss is not."""
        named: list[str] = []
        for ids, loss, terms in self.micro_batches:
            rows = terms.isfinite().reshape(len(terms), -1).all(dim=1)
            blocks = rows.reshape(-1, len(ids)) if len(rows) % len(ids) == 0 else rows.all().expand(1, len(ids))
            bad = [name for name, good in zip(ids, blocks.all(dim=0).tolist(), strict=True) if not good]
            named += bad or ([] if bool(loss.isfinite()) else list(ids))
        return named


@dataclass(frozen=True)
class _Part:
    """A micro-batch on its way: what was drawn, its pieces with their extents, its terms (with a graph if live)."""

    batch: Batch
    draws: Any
    pieces: list[Piece]
    extents: list[int]
    terms: Terms
    live: bool


class GradientPass:
    """Computes the gradient of an update and leaves it in the parameters, the same on all processes.

    Args:
        strategy: the method.
        ctx: what the strategy sees.
        parameters: all that is trained.
        processes: whom to share with.
        autocast: type of automatic mixed precision, or None.
        stopwatch: where the time goes.
    """

    def __init__(
        self,
        strategy: Strategy,
        ctx: Context,
        parameters: Sequence[torch.nn.Parameter],
        processes: Processes,
        autocast: torch.dtype | None = None,
        stopwatch: Stopwatch | None = None,
    ) -> None:
        self._strategy, self._ctx = strategy, ctx
        self._parameters = list(parameters)
        self._processes = processes
        self._autocast = autocast
        self._watch = stopwatch or Stopwatch()

    def __call__(self, update: Update | None, loss_scale: Tensor | float = 1.0) -> Account:
        """Run one update; every process must call it, one that has nothing to contribute with None.

        Args:
            update: the micro-batches of this process.
            loss_scale: factor on the gradient, for float16.

        Returns:
            the account; its weight is 0, and gradients are untouched, if no process had an example.
        """
        batches = list(update.micro_batches) if update else []
        share = sum(b.size for b in batches) if update is None or update.weight is None else update.weight
        table = self._processes.table([len(batches), share])
        account = Account(weight=sum(row[1] for row in table))
        if not account.weight:
            return account
        counts = [int(row[0]) for row in table]
        spare = self._fill_up(batches, counts)
        for group, uneven in self._groups(batches, counts):
            # a graph is kept only where nothing else must be known before the loss
            parts = [self._evaluate(batch, keep_graph=len(group) == 1) for batch in group]
            statistics = self._statistics([part for part in parts if part.batch is not spare], uneven)
            for part in parts:
                entered = None if part.batch is spare else account
                self._backward(part, statistics, loss_scale / account.weight, entered)
        sum_gradients(self._parameters, self._processes)
        if self._ctx.reference is not None:
            self._ctx.reference.share()
        return account

    def _fill_up(self, batches: list[Batch], counts: list[int]) -> Batch | None:
        """Let all processes of a network in shards run equally many micro-batches: the passes of one need all others.

        Those with fewer run one that a neighbour has lent, which is returned: it counts nowhere.
        """
        if not is_sharded(self._ctx.policy.module) or min(counts) == max(counts):
            return None
        spare = self._processes.lend(batches[0] if batches else None)
        batches += [spare] * (max(counts) - len(batches))
        return spare

    def _groups(self, batches: list[Batch], counts: list[int]) -> Iterator[tuple[list[Batch], bool]]:
        """Yield the micro-batches that share a statistic, and whether some process has none there.

        All processes yield equally many groups where statistics are reduced over them.
        """
        scope = self._strategy.spec.statistics
        if scope == "update":
            yield batches, min(counts) == 0
            return
        rounds = max(counts) if scope == "micro_batch" else len(batches)
        for index in range(rounds):
            yield batches[index : index + 1], min(counts) <= index

    def _evaluate(self, batch: Batch, keep_graph: bool) -> _Part:
        strategy, ctx = self._strategy, self._ctx
        apart = networks_of(ctx) if strategy.spec.lockstep != "all" else []
        with self._watch("draw"), gathered(apart), ctx.policy.inference(), self.mixed():
            draws = strategy.draw(ctx, batch)
        pieces = strategy.pieces(ctx, batch, draws)
        live = keep_graph and len(pieces) == 1
        parts = []
        for index, piece in enumerate(pieces):
            with self._under(piece):
                with self._watch("reference"), ctx.policy.inference(), self.mixed():
                    frozen = strategy.frozen(ctx, batch, draws, piece)
                with self._watch("policy"):
                    parts.append(Terms(self._terms(batch, draws, piece, index, live), frozen))
        dim = strategy.spec.piece_dim
        return _Part(batch, draws, pieces, [part.policy.shape[dim] for part in parts], Terms.join(parts, dim), live)

    def _terms(self, batch: Batch, draws: Any, piece: Piece, index: int, graph: bool) -> Tensor:
        with self._own_dropout(batch, index), self.mixed(), torch.set_grad_enabled(graph):
            return self._strategy.terms(self._ctx, batch, draws, piece)

    def _statistics(self, parts: list[_Part], uneven: bool) -> Mapping[str, Tensor]:
        if self._strategy.spec.statistics == "none":
            return {}
        whole = join_micro_batches([(part.terms, part.batch.size) for part in parts]) if parts else None
        if uneven:
            layouts = self._processes.exchange(whole and _layout(whole))
            layout = next(layout for layout in layouts if layout)
            whole = whole or _empty(layout, self._ctx.device)
        assert whole is not None
        with torch.no_grad():
            return self._strategy.statistics(whole, self._processes.sum)

    def _backward(
        self, part: _Part, statistics: Mapping[str, Tensor], factor: Tensor | float, account: Account | None
    ) -> None:
        """Add the gradient of a micro-batch, and enter it; without an account it adds nothing, by the same passes."""
        terms = part.terms if part.live else Terms(part.terms.policy.detach().requires_grad_(), part.terms.frozen)
        output = None if account is None else self._strategy.loss(terms, statistics, part.batch)
        if account is not None and output is not None:
            account.add(part.batch, output, terms.policy)
        if output is not None and output.loss.requires_grad:
            objective = output.loss * part.batch.size * factor
        elif is_sharded(self._ctx.policy.module):
            objective = without_gradient(terms.policy)  # the other processes wait for this one's passes
        else:
            return  # a loss that depends on no term, such as a group without variance
        if part.live:
            with self._under(part.pieces[0]):
                self._run_backward(objective, None)
            return
        (coefficients,) = torch.autograd.grad(objective, terms.policy)
        shares = coefficients.split(part.extents, dim=self._strategy.spec.piece_dim)
        for index, (piece, share) in enumerate(zip(part.pieces, shares, strict=True)):
            with self._under(piece):
                with self._watch("policy"):
                    values = self._terms(part.batch, part.draws, piece, index, graph=True)
                self._run_backward(values, share)

    def _run_backward(self, values: Tensor, coefficients: Tensor | None) -> None:
        self._ctx.policy.adapters.assert_ready_for_backward()
        with self._watch("backward"):
            torch.autograd.backward(values, coefficients)

    @contextmanager
    def _under(self, piece: Piece) -> Iterator[None]:
        """Hold the piece's adapter active, forward and backward."""
        if piece.adapter is None:
            yield
        else:
            with self._ctx.policy.adapters.using(piece.adapter):
                yield

    def mixed(self) -> torch.autocast:
        """Automatic mixed precision of the run.

        Of a network in shards no rounded weight is remembered: every process would hold a copy of all of them until the
        end of a pass, although it borrows the weights themselves block by block.
        """
        kind, cache = self._ctx.device.type, not is_sharded(self._ctx.policy.module)
        return torch.autocast(kind, dtype=self._autocast, enabled=self._autocast is not None, cache_enabled=cache)

    @contextmanager
    def _own_dropout(self, batch: Batch, index: int) -> Iterator[None]:
        """Make dropout a function of the examples: equal in both passes over a piece, and after a resume."""
        devices = [self._ctx.device] if self._ctx.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(derive_seed("dropout", index, *batch.seeds.tolist()))
            yield


def without_gradient(terms: Tensor) -> Tensor:
    """Return 0 with a graph down to the terms, whose gradient is exactly 0 even where they are not finite."""
    return 0.0 * terms.nan_to_num(0.0, 0.0, 0.0).sum()


def join_micro_batches(parts: Sequence[tuple[Terms, int]]) -> Terms:
    """Join the terms of micro-batches as if they had been one, in block order and without a graph.

    Args:
        parts: terms and number of examples of each micro-batch; the rows are whole blocks of the examples.
            Shorter terms are padded on the right with zeros, their masks too.
    """
    terms = [part for part, _ in parts]
    sizes = [size for _, size in parts]

    def together(values: list[Tensor]) -> Tensor:
        width = max(value.shape[1] for value in values)
        padded = [F.pad(value.detach(), (0, width - value.shape[1])) for value in values]
        blocks = {len(value) / size for value, size in zip(padded, sizes, strict=True)}
        if len(blocks) > 1 or not blocks.copy().pop().is_integer():
            return torch.cat(padded)
        split = [value.split(size) for value, size in zip(padded, sizes, strict=True)]
        return torch.cat([torch.cat(block) for block in zip(*split, strict=True)])

    frozen = {name: together([part.frozen[name] for part in terms]) for name in terms[0].frozen}
    return Terms(together([part.policy for part in terms]), frozen)


_Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


def _layout(terms: Terms) -> _Layout:
    return {name: (tuple(v.shape[1:]), v.dtype) for name, v in {"": terms.policy, **terms.frozen}.items()}


def _empty(layout: _Layout, device: torch.device) -> Terms:
    """Terms of no rows, for a process that must take part in a sum without having examples."""
    values = {name: torch.zeros(0, *shape, dtype=dtype, device=device) for name, (shape, dtype) in layout.items()}
    return Terms(values.pop(""), values)
