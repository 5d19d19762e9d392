"""The loop. It knows strategies, batches and steps; it knows no method, no model family and no data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from rich.console import Console

from diffalign.batch import Batch
from diffalign.errors import RunStopped
from diffalign.strategies.base import Context, Strategy, Update
from diffalign.training.checkpoint import RunIdentity, find_together, save_checkpoint
from diffalign.training.config import OptimOptions, RunOptions
from diffalign.training.early_stop import EarlyStop
from diffalign.training.guards import Guards
from diffalign.training.memory import Activity, Networks, out_of_memory
from diffalign.training.observing import Observer, looking
from diffalign.training.processes import Processes
from diffalign.training.progress import ProgressDisplay
from diffalign.training.report import LeftOut, Reporter, Spent
from diffalign.training.runfolder import Claim, RunFolder
from diffalign.training.sharding import gathered, saved_whole, whole
from diffalign.training.signals import StopRequest
from diffalign.training.step import Stepper, StepResult
from diffalign.training.stopwatch import Stopwatch
from diffalign.training.trackers import Tracker, build_trackers
from diffalign.training.trainables import Trainables

T = TypeVar("T")


class BatchSource(Protocol):
    """Gives, endlessly, the micro-batches that this process contributes to each global batch.

    Attributes:
        left_out: counts what of a stream this process could not use so far; None where that is known from the start.
    """

    left_out: Callable[[], Mapping[str, int]] | None

    @property
    def completed_epochs(self) -> int: ...

    def __iter__(self) -> Iterator[Sequence[Batch]]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


@dataclass(frozen=True)
class RunRecord:
    """What is written about a run.

    Args:
        identity: what a checkpoint must share with the run that continues it.
        config: all options under their outside names.
        metadata: text for the header of exported weights; how far the run has come is added.
        header: lines printed at the start.
        card: makes the model card from the figures measured at the end, the steps done and those planned.
    """

    identity: RunIdentity
    config: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)
    header: Sequence[str] = ()
    card: Callable[[Mapping[str, Any], int, int], str] | None = None


@dataclass(frozen=True)
class RunResult:
    """Result of a run.

    Args:
        folder: the run folder.
        steps: optimizer steps done in all.
        metrics: those of the last logging interval.
        summary: figures measured before and after, where the data allow any.
        interrupted: name of the signal that ended the run early, or None; its weights and a checkpoint are there, its
            figures are not.
        stopped_early: a held-out reward ended the run; known to the main process.
    """

    folder: Path
    steps: int
    metrics: dict[str, float] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    interrupted: str | None = None
    stopped_early: bool = False


class Trainer:
    """Trains what a strategy asks for.

    Args:
        strategy: the method; its ``build`` has run.
        ctx: what it sees; ``ctx.total_steps`` is the length of the run.
        source: batches of this process.
        processes: all processes of the run.
        optim, run: options.
        learning_rate: the peak rate, after any scaling rule.
        folder: where everything is written.
        record: what is written about the run.
        epochs: end after so many passes over the data, also where they gave fewer updates than were planned; 0: the
            number of steps alone decides.
        observer: validation and evaluation, if any.
        trackers: told of metrics besides those that ``run`` names.
        console: where to print; None is silent.
        claim: the hold on the folder, released at the end.
    """

    def __init__(
        self,
        strategy: Strategy,
        ctx: Context,
        source: BatchSource,
        processes: Processes,
        *,
        optim: OptimOptions,
        run: RunOptions,
        learning_rate: float,
        folder: Path,
        record: RunRecord,
        epochs: int = 0,
        observer: Observer | None = None,
        trackers: Sequence[Tracker] = (),
        console: Console | None = None,
        claim: Claim | None = None,
    ) -> None:
        self.strategy, self.ctx, self.source = strategy, ctx, source
        self._processes, self._run, self._record, self._observer = processes, run, record, observer
        self._console = console if processes.is_main else None
        self._watch, self._trackers = Stopwatch(ctx.device), trackers
        self._folder, self._claim = RunFolder(folder), claim or Claim(folder)
        self.trainables = Trainables(strategy, ctx.policy)
        guards = Guards(run.guard_patience, run.spike_factor, run.max_skipped_steps, strategy.spec.waived_guards)
        self._stepper = Stepper(strategy, ctx, self.trainables, optim, learning_rate, guards, processes, self._watch)
        self._early_stop = EarlyStop(self.trainables, run.early_stop_patience)
        self._epochs = epochs
        self._saved_step: int | None = None
        self._rollout_start: dict[str, Any] | None = None
        self._spent, self._left_out = Spent(ctx.progress, processes), LeftOut(source.left_out, processes)

    def fit(self) -> RunResult:
        """Train to the planned number of steps, or to a signal; return what came of it.

        Raises:
            RunStopped: if a guard or a failing reward ended the run; a checkpoint of the last good weights is there
                then, unless no step was taken.
            UserError: for a checkpoint that does not fit, or no space to write.
        """
        with self._claim.released():
            return self._fit()

    def _fit(self) -> RunResult:
        self._resume()
        trackers = self._open()
        try:
            with StopRequest() as stop:
                if not self.ctx.step:
                    self._watch_over(lambda observer: observer.before(self._folder))
                metrics = self._train(trackers, stop)
                self._save()
                self._export()
                signal = self._first_heard(stop)
            summary: dict[str, Any] = {}
            if signal is None:
                with self._shown():
                    summary = self._observe(lambda o: o.after(self.ctx.step, self._folder, trackers)) or {}
            self._write_card(summary)
        except RunStopped as stopped:
            if not self.ctx.step:
                raise
            self._save()
            raise RunStopped(f"{stopped} (the weights it ended with are in {self._folder.checkpoints})") from stopped
        finally:
            self.strategy.close()
            for tracker in trackers:
                tracker.close()
        self._say(*self._left_out.lines(), self._farewell(signal))
        return RunResult(self._folder.path, self.ctx.step, metrics, summary, signal, self._early_stop.over)

    def _train(self, trackers: Sequence[Tracker], stop: StopRequest) -> dict[str, float]:
        ctx, run = self.ctx, self._run
        ctx.policy.module.train()
        batches = iter(self.source)
        with ProgressDisplay(ctx.total_steps, ctx.step, ctx.device, self._console) as display:
            reporter = Reporter(
                self._processes,
                trackers,
                display,
                self._watch,
                self._spent,
                self._left_out,
                run.logging_steps,
                ctx.step,
                ctx.total_steps,
                self.strategy.advise,
            )
            ctx.progress.show = display.work
            while not (self._complete or self._data_used_up or self._anywhere(stop.requested)):
                self._rollout_start = self.source.state_dict()
                with self._watch("data"):
                    collected = next(batches)
                due = False  # regular checkpoints fall between rollouts, never inside one
                with self._advised("sampling"):
                    updates = self.strategy.collect(ctx, collected)
                for update in self._balanced(updates):
                    result = self._step(update)
                    self._rollout_start = None
                    if result is None:
                        continue
                    reporter.step(ctx.step, result)
                    due |= _falls_on(run.checkpointing_steps, ctx.step)
                    if _falls_on(run.validation_steps, ctx.step) and ctx.step < ctx.total_steps:
                        self._watch_over(lambda observer: observer.during(ctx.step, self._folder, trackers))
                        reporter.restart_clock()
                    if self._complete:
                        break
                if due:
                    self._save()
                    reporter.restart_clock()
        return reporter.metrics

    @property
    def _complete(self) -> bool:
        """Whether the run has come to its end, the planned one or an early one; the same on all processes."""
        return self._early_stop.over or self.ctx.step >= self.ctx.total_steps

    @property
    def _data_used_up(self) -> bool:
        """Whether the planned passes over the data are done; may be so before the last updates of a rollout."""
        return bool(self._epochs) and self.source.completed_epochs >= self._epochs

    def _step(self, update: Update | None) -> StepResult | None:
        with self._advised("activations"):
            result = self._stepper(update)
        if result is not None:
            self.ctx.progress.step += 1
            if result.applied:
                self.strategy.after_step(self.ctx)
        return result

    def _balanced(self, updates: Iterable[Update]) -> Iterator[Update | None]:
        """Yield as often as the process with most updates; None where this one has no more."""
        iterator = iter(updates)
        while True:
            with self._advised("sampling"), self._watch("rollout"), self._stepper.mixed():
                update = next(iterator, None)
            if not self._anywhere(update is not None):
                return
            yield update

    @contextmanager
    def _advised(self, activity: Activity) -> Iterator[None]:
        """Say what to do where memory runs out."""
        try:
            yield
        except torch.OutOfMemoryError as error:
            held, shards = Networks.of(self.ctx), self._processes.shards
            told = out_of_memory(activity, held, self.trainables.count, self._record.config, shards)
            # one process alone can still save what it has learned; several may not all have run out
            raise (RunStopped(str(told)) if self._processes.world_size == 1 else told) from error

    def _first_heard(self, stop: StopRequest) -> str | None:
        """Return the signal that any process has received: all end alike, whichever was told to."""
        return next((name for name in self._processes.exchange(stop.signal) if name is not None), None)

    def _anywhere(self, flag: bool) -> bool:
        return any(row[0] for row in self._processes.table([float(flag)]))

    def _open(self) -> list[Tracker]:
        """Write the records of the run and open its trackers; say what is about to happen."""
        self._say(*self._record.header, f"run folder {self._folder.path}")
        folder, config = self._folder, self._record.config

        def opened() -> list[Tracker]:
            folder.record(config)
            return [*build_trackers(self._run.report_to, folder.path, config, self.ctx.step), *self._trackers]

        return self._on_main(opened) or []

    def _on_main(self, work: Callable[[], T]) -> T | None:
        return self._folder.on_main(self._processes, work)

    def _resume(self) -> None:
        if self._run.resume_from_checkpoint is None:
            return
        wanted = self._run.resume_from_checkpoint
        checkpoint, remarks = find_together(wanted, self._folder.checkpoints, self._processes)
        checkpoint.check_identity(self._record.identity)
        self.trainables.load_state_dict(checkpoint.weights)
        self._stepper.load_state_dict(checkpoint.state["stepper"])
        self.strategy.load_state_dict(checkpoint.state["strategy"])
        self.source.load_state_dict(checkpoint.state["source"])
        if self.ctx.reference is not None:
            self.ctx.reference.load_state_dict(checkpoint.state["reference"])
        self._early_stop.load_state_dict(checkpoint.state["early_stop"])
        self._spent.load_state_dict(checkpoint.state["spent"])
        self.ctx.progress.step = self._saved_step = checkpoint.step
        changed = checkpoint.changed_options(self._record.config)
        self._say(*remarks, f"resumed from {checkpoint.folder} after step {checkpoint.step}", *changed)

    def _save(self) -> None:
        """Write a checkpoint unless this step has one; all processes together."""
        spent, main = self._spent.state_dict(), self._processes.is_main
        if self._saved_step != self.ctx.step:
            parts = (self.trainables, self._stepper, self._early_stop)
            weights, stepper, early_stop = (whole(part.state_dict(), keep=main) for part in parts)

            def save() -> None:
                state = {
                    "identity": asdict(self._record.identity),
                    "config": dict(self._record.config),
                    "stepper": stepper,
                    "strategy": self.strategy.state_dict(),
                    # data of which nothing has been learned yet come again
                    "source": self._rollout_start or self.source.state_dict(),
                    "reference": self.ctx.reference.state_dict() if self.ctx.reference is not None else {},
                    "early_stop": early_stop,
                    "spent": spent,
                }
                keep = self._run.checkpoints_total_limit
                save_checkpoint(self._folder.checkpoints, self.ctx.step, weights, state, keep)

            self._on_main(save)
        self._saved_step = self.ctx.step

    def _watch_over(self, look: Callable[[Observer], float | None]) -> None:
        """Let the observer look, and early stopping judge what it saw, on every process alike."""
        with self._shown():
            value = self._processes.exchange(self._observe(look))[0]
            self._early_stop.look(self.ctx.step, value)

    def _observe(self, look: Callable[[Observer], Any]) -> Any:
        """Let the observers of all processes look, in the precision that is trained in."""
        if self._observer is None:
            return None
        with gathered([self.ctx.policy.module]), looking(self.ctx), self._advised("validation"), self._stepper.mixed():
            return look(self._observer)

    def _export(self) -> None:
        """Write the weights as they are used, whether the run has come to its end or was stopped."""
        main, ctx = self._processes.is_main, self.ctx
        metadata = {"train_steps": str(self._exported_step), "max_train_steps": str(ctx.total_steps)}
        folder, header = self._folder.path, {**self._record.metadata, **metadata}
        with self._shown():
            if self.strategy.spec.trains == "policy":
                with saved_whole(ctx.policy.module, keep=main):
                    self._on_main(lambda: ctx.policy.save(folder, header))
            self._on_main(lambda: self.strategy.export(ctx, folder))

    def _write_card(self, summary: Mapping[str, Any]) -> None:
        steps, card = (self._exported_step, self.ctx.total_steps), self._record.card
        if card is not None:
            self._on_main(lambda: self._folder.write_card(card(summary, *steps)))

    @property
    def _exported_step(self) -> int:
        """The step whose weights are exported."""
        return self._early_stop.best_step if self._early_stop.over else self.ctx.step

    def _shown(self) -> Any:
        """Hold the weights that are looked at and exported: the best of an ended run, else the moving average."""
        if self._early_stop.over:
            return self._early_stop.best()
        average = self._stepper.average
        return average.applied() if average is not None else nullcontext()

    def _farewell(self, signal: str | None) -> str:
        if signal is None:
            why = f"; {self._early_stop.describe()}" if self._early_stop.over else ""
            return f"done: {self.ctx.step} steps{why}; results in {self._folder.path}"
        folder = self._folder.path
        return (
            f"{signal} received: stopped after step {self.ctx.step} of {self.ctx.total_steps}; the weights so far are "
            f"in {folder}; continue with the same command and --output_dir {folder} --resume_from_checkpoint latest"
        )

    def _say(self, *lines: str) -> None:
        if self._console is not None:
            for line in lines:
                self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def _falls_on(interval: int, step: int) -> bool:
    return bool(interval) and step % interval == 0
