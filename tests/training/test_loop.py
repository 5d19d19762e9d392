"""What the loop does besides updates: logging, guards, moving average, export."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from diffalign.batch import Batch
from diffalign.errors import RunStopped, UserError
from diffalign.strategies.base import Context, LossOutput, Piece, Terms, Update
from diffalign.training.checkpoint import list_checkpoints, read_checkpoint
from diffalign.training.config import OptimOptions
from diffalign.training.guards import Guards, Verdict
from diffalign.training.trackers import METRICS_FILE
from diffalign.training.update import GradientPass
from tests.interface.fakes import Fake
from tests.interface.run_fakes import Rollout
from tests.interface.toy import ToyPolicy, ToySource, features, toy_batch
from tests.training.support import OPTIM, toy_trainer

SGD = OptimOptions(optimizer="sgd", learning_rate=0.1, max_grad_norm=0.0)


class Squares(Fake):
    """Pulls all values to one, and reports them."""

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        return LossOutput((terms.policy - 1).square().mean(), {"value": terms.policy[:, 0].detach()})


class Poisoned(Squares):
    """One example's term is not a number from a step on."""

    def terms(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Tensor:
        bad = torch.tensor([[ctx.step >= 2 and name == "example-3"] for name in batch.ids])
        return torch.where(bad, torch.nan, super().terms(ctx, batch, draws, piece))


class Flat(Fake):
    """Has no gradient."""

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        return LossOutput(0 * terms.policy.sum() + 1)


class Advising(Squares):
    """Has something to say of every interval."""

    def advise(self, metrics: Mapping[str, float]) -> str:
        return "values lie far from one" if metrics["loss"] > 0 else ""


class Silent(Squares):
    """Has nothing to say of one example: a loss without a graph."""

    spec = dataclasses.replace(Fake.spec, waived_guards={"zero_gradient": "example-4 teaches nothing"})

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        output = super().loss(terms, statistics, batch)
        return LossOutput(torch.ones_like(output.loss)) if batch.ids == ["example-4"] else output


class Excused(Flat):
    """Has no gradient, and a reason."""

    spec = dataclasses.replace(Fake.spec, waived_guards={"zero_gradient": "flat by design"})


def log_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]


def test_metrics_are_means_over_examples(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "run", Squares(), steps=1, optim=SGD).fit()
    (line,) = log_of(tmp_path / "run")
    seeds = torch.cat([batch.seeds for batch in next(iter(ToySource()))])
    values = features(Batch([""] * 4, seeds), 1)[:, 0] @ torch.tensor([0.3, -0.7], dtype=torch.float64)
    assert line["value"] == pytest.approx(values.mean().item(), rel=1e-6)
    assert line["loss"] == pytest.approx((values - 1).square().mean().item(), rel=1e-6)
    assert line["step"] == 1
    assert {"grad_norm", "learning_rate", "examples_per_second", "skipped_steps", "seconds"} <= line.keys()
    assert "images" not in line  # nothing was sampled


def test_a_run_passes_its_methods_advice_on(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", Advising(), steps=8, optim=SGD)
    trainer._console = Console(file=io.StringIO(), width=200)
    trainer.fit()
    said = trainer._console.file.getvalue()  # type: ignore[attr-defined]
    assert said.count("note: for 5 logging intervals values lie far from one") == 1


def test_the_logged_loss_is_that_of_the_guards_where_examples_were_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[float] = []

    def judge(self: Guards, loss: float, gradient_norm: float, scaler_adapts: bool = False) -> Verdict:
        judged.append(loss)
        return "apply"

    monkeypatch.setattr(Guards, "judge", judge)
    toy_trainer(tmp_path / "run", Rollout(), steps=4, optim=SGD).fit()
    assert [line["loss"] for line in log_of(tmp_path / "run")] == pytest.approx(judged, rel=1e-6)
    kept = ToyPolicy().value(features(toy_batch([0, 2]), 1, stream="inner 0"))  # two of the four examples
    assert judged[0] == pytest.approx(kept.exp().sum().item() / 4)


def test_logging_interval_averages_steps(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "each", Squares(), steps=4, optim=SGD).fit()
    toy_trainer(tmp_path / "two", Squares(), steps=4, optim=SGD, logging_steps=2).fit()
    each, two = log_of(tmp_path / "each"), log_of(tmp_path / "two")
    assert [line["step"] for line in two] == [2, 4]
    weighted = (4 * each[0]["value"] + 1 * each[1]["value"]) / 5  # updates of four examples and of one
    assert two[0]["value"] == pytest.approx(weighted, rel=1e-5)


def test_a_loss_that_is_no_number_names_the_example(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", Poisoned(), steps=10)
    with pytest.raises(RunStopped, match=r"step 3 .* examples: example-3\.") as error:
        trainer.fit()
    assert "no weight was changed" in str(error.value)
    assert all(value.isfinite().all() for value in trainer.trainables.state_dict().values())
    assert list_checkpoints(tmp_path / "run" / "checkpoints")[-1].name == "step-00000002"


def test_no_gradient_stops_after_patience(tmp_path: Path) -> None:
    with pytest.raises(RunStopped, match="gradient is exactly 0 for 3 consecutive steps"):
        toy_trainer(tmp_path / "run", Flat(), steps=10).fit()


def test_a_method_may_waive_a_guard(tmp_path: Path) -> None:
    assert toy_trainer(tmp_path / "run", Excused(), steps=5).fit().steps == 5


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_an_update_without_a_graph_leaves_the_weights_alone(precision: Any, tmp_path: Path) -> None:
    optim = dataclasses.replace(SGD, mixed_precision=precision)
    every = {"checkpointing_steps": 1, "checkpoints_total_limit": 0}
    assert toy_trainer(tmp_path / "run", Silent(), steps=4, optim=optim, **every).fit().steps == 4
    folders = list_checkpoints(tmp_path / "run" / "checkpoints")
    first, second, third, fourth = (read_checkpoint(folder).weights["vectors.default"] for folder in folders)
    assert second.equal(first)
    assert not third.equal(second)
    assert fourth.equal(third)
    assert [line["grad_norm"] > 0 for line in log_of(tmp_path / "run")] == [True, False, True, False]


@pytest.mark.parametrize(
    ("strategy", "observer", "largest"),
    [("collect", None, "sampling"), ("loss", None, "activations"), ("", "before", "validation")],
)
def test_memory_that_runs_out_is_a_message(
    strategy: str, observer: str | None, largest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflow(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    trainer = toy_trainer(tmp_path / "run", Squares(), steps=1)
    config = {"optimizer": "sgd", "use_ema": False}
    monkeypatch.setattr(trainer, "_record", dataclasses.replace(trainer._record, config=config))
    if strategy:
        monkeypatch.setattr(trainer.strategy, strategy, overflow)
    if observer:
        monkeypatch.setattr(trainer, "_observer", SimpleNamespace(before=overflow))
    with pytest.raises(UserError, match=f"out of memory on cpu: most of it goes to {largest}"):
        trainer.fit()


def test_memory_that_runs_out_costs_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hungry(Squares):
        def terms(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Tensor:
            if ctx.step == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return super().terms(ctx, batch, draws, piece)

    trainer = toy_trainer(tmp_path / "run", Hungry(), steps=6)
    config = {"optimizer": "sgd", "use_ema": False}
    monkeypatch.setattr(trainer, "_record", dataclasses.replace(trainer._record, config=config))
    with pytest.raises(RunStopped, match=r"out of memory on cpu.* ended with are in"):
        trainer.fit()
    assert toy_trainer(tmp_path / "run", Squares(), steps=6, resume_from_checkpoint="latest").fit().steps == 6
    toy_trainer(tmp_path / "straight", Squares(), steps=6).fit()
    ends = [torch.load(tmp_path / name / "toy.pt", weights_only=True)["default"] for name in ("run", "straight")]
    assert torch.equal(*ends)


def test_export_is_the_moving_average(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", Squares(), steps=5, optim=OPTIM)
    trainer.fit()
    exported = torch.load(tmp_path / "run" / "toy.pt", weights_only=True)["default"]
    average = trainer._stepper.average
    assert average is not None
    assert torch.equal(exported, average.state_dict()["vectors.default"])
    assert not torch.equal(exported, trainer.ctx.policy.adapters.vector())


def test_an_average_is_lent_to_the_parameters_and_not_copied(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path / "run", Squares(), steps=3, optim=OPTIM)
    trainer.fit()
    average, named = trainer._stepper.average, trainer.trainables.named
    assert average is not None
    values = {name: value.clone() for name, value in trainer.trainables.state_dict().items()}
    places = {name: parameter.data_ptr() for name, parameter in named.items()}
    objects = dict(named)
    with suppress(KeyError), average.applied():  # what comes back comes back after an exception, too
        for name, lent in average.state_dict().items():
            assert named[name].data_ptr() == lent.data_ptr()
            assert not torch.equal(lent, values[name])
        raise KeyError
    assert all(named[name] is parameter for name, parameter in objects.items())  # as the optimizer knows them
    assert {name: parameter.data_ptr() for name, parameter in named.items()} == places
    assert all(torch.equal(named[name], value) for name, value in values.items())


def test_values_of_another_kind_are_copied(tmp_path: Path) -> None:
    trainables = toy_trainer(tmp_path / "run").trainables
    (name, parameter), *_ = trainables.named.items()
    given = {name: parameter.detach().float() + 1 for name, parameter in trainables.named.items()}
    before = parameter.detach().clone()
    with trainables.holding(given):
        assert parameter.dtype is torch.float64
        assert torch.equal(parameter, given[name].double())
        assert parameter.data_ptr() != given[name].data_ptr()
    assert torch.equal(parameter, before)
    with pytest.raises(UserError, match="has shape"), trainables.holding({name: torch.zeros(3) for name in given}):
        pass
    assert torch.equal(parameter, before)


def test_terms_that_ignore_the_policy_are_caught(tmp_path: Path) -> None:
    class Detached(Squares):
        def terms(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Tensor:
            return super().terms(ctx, batch, draws, piece).detach()

    with pytest.raises(RunStopped, match="gradient is exactly 0"):
        toy_trainer(tmp_path / "run", Detached(), steps=10).fit()


def test_backward_with_adapters_off_is_refused(tmp_path: Path) -> None:
    class Leaves(Squares):
        def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
            self.bank.active = None
            return super().loss(terms, statistics, batch)

    strategy = Leaves()
    trainer = toy_trainer(tmp_path / "run", strategy, steps=1)
    strategy.bank = trainer.ctx.policy.adapters  # type: ignore[attr-defined]
    with pytest.raises(RuntimeError, match="adapters are switched off"):
        trainer.fit()


def test_record_of_a_run(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "run", Squares(), steps=1).fit()
    environment = json.loads((tmp_path / "run" / "environment.json").read_text())
    assert environment["packages"]["torch"] == torch.__version__
    assert (tmp_path / "run" / "config.yaml").read_text().startswith("method: fake")


class Overflowing(Fake):
    """The loss of one example is beyond all numbers."""

    def terms(self, ctx: Context, batch: Batch, draws: Tensor, piece: Piece) -> Tensor:
        far = torch.tensor([[1e4 * (name == "example-3")] for name in batch.ids])
        return super().terms(ctx, batch, draws, piece) + far

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Batch) -> LossOutput:
        return LossOutput(terms.policy.exp().mean())


class Neighboured:
    """What the only process would see beside one that runs some micro-batches, and lends example 3."""

    world_size = 1

    def __init__(self, neighbours: float) -> None:
        self._row = [neighbours, 1.0]

    def table(self, row: list[float]) -> list[list[float]]:
        return [row, self._row]

    def lend(self, batch: Batch | None) -> Batch:
        return toy_batch([3])


class Rounded(TorchDispatchMode):
    """Notes what is rounded to half precision, without holding it."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[StorageWeakRef] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and result.dtype is torch.bfloat16:
            self.copies.append(StorageWeakRef(result.untyped_storage()))
        return result


@pytest.mark.parametrize("in_shards", [False, True])
def test_a_process_of_several_keeps_no_copy_of_all_weights(in_shards: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autocast remembers the rounded weights of a whole pass, shards or not."""
    monkeypatch.setattr("diffalign.training.update.is_sharded", lambda module: in_shards)
    step = GradientPass(Squares(), Context(policy=ToyPolicy()), [], Neighboured(0), torch.bfloat16)  # type: ignore[arg-type]
    layer, pixels = torch.nn.Linear(4, 4, bias=False), torch.ones(2, 4, dtype=torch.bfloat16)
    with step.mixed(), Rounded() as rounded, torch.no_grad():
        layer(pixels)
        assert [copy.expired() for copy in rounded.copies] == [in_shards]


def test_a_lent_micro_batch_adds_nothing_whatever_its_loss_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffalign.training.update.is_sharded", lambda module: True)
    gradients = []
    for neighbours in (1.0, 2.0):
        ctx = Context(policy=ToyPolicy())
        parameters = list(ctx.policy.module.parameters())
        step = GradientPass(Overflowing(), ctx, parameters, Neighboured(neighbours))  # type: ignore[arg-type]
        step(Update([toy_batch([0])]))
        gradients.append(parameters[0].grad)
    assert gradients[0].abs().min() > 0
    assert gradients[1].equal(gradients[0])
