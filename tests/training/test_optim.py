"""Learning rates, clipping, averages, guards: small pieces with exact answers."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import RunStopped, UserError
from diffalign.strategies.base import ParameterGroup
from diffalign.training.batch_plan import plan_batches
from diffalign.training.config import OptimOptions
from diffalign.training.ema import MovingAverage
from diffalign.training.guards import Guards
from diffalign.training.optim import build_optimizer, clip_gradients, learning_rate_factor, scaled_learning_rate
from diffalign.training.trainables import Trainables
from tests.interface.fakes import PolicyInDraw
from tests.interface.toy import ToyPolicy


@pytest.mark.parametrize("name", ["constant", "linear", "cosine", "constant_with_warmup"])
def test_schedules(name: str) -> None:
    options = OptimOptions(lr_scheduler=name, lr_warmup_steps=4)  # type: ignore[arg-type]
    curve = [learning_rate_factor(step, 20, options) for step in range(21)]
    assert all(0 <= value <= 1 for value in curve)
    if name == "constant":
        assert curve == [1.0] * 21
        return
    assert curve[:4] == [0.2, 0.4, 0.6, 0.8]
    assert curve[4] == 1.0
    if name == "constant_with_warmup":
        assert curve[4:] == [1.0] * 17
    else:
        assert curve[20] == pytest.approx(0.0, abs=1e-12)
        assert curve[12] == pytest.approx(0.5)
        assert curve[4:] == sorted(curve[4:], reverse=True)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 64), st.integers(1, 8))
def test_the_schedule_does_not_know_the_number_of_processes(share: int, world: int) -> None:
    """Same global batch, same optimizer steps, hence the same curve: nothing else enters."""
    options = OptimOptions(train_batch_size=share, global_batch_pairs=share * world, lr_scheduler="cosine")
    plan = plan_batches(options, world)
    assert plan.global_batch == share * world
    assert learning_rate_factor(3, 10, options) == learning_rate_factor(3, 10, replace(options, train_batch_size=1))


def test_scaling_rules_are_named_and_printed() -> None:
    options = OptimOptions(learning_rate=1e-4)
    assert scaled_learning_rate(options, 16) == (1e-4, "learning rate 0.0001")
    rate, line = scaled_learning_rate(replace(options, scale_lr="linear"), 16)
    assert rate == pytest.approx(1.6e-3)
    assert "0.0001 x global batch 16" in line
    assert scaled_learning_rate(replace(options, scale_lr="sqrt"), 16)[0] == pytest.approx(4e-4)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "sgd"])
def test_optimizers_step(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = build_optimizer([ParameterGroup([p])], OptimOptions(optimizer=name), torch.device("cpu"))  # type: ignore[arg-type]
    p.sum().backward()
    optimizer.step()
    assert (p < 1).all()


@pytest.mark.parametrize("scale", [1e-3, 0.05, 10.0])
def test_adafactor_steps_by_the_rate_whatever_the_scale_of_the_weights(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(64, 32), (8, 4, 3, 3), (50,)]
    starts = [scale * torch.randn(shape, generator=generator) for shape in shapes]
    weights = [torch.nn.Parameter(start.clone()) for start in starts]
    options = OptimOptions(optimizer="adafactor", learning_rate=1e-3, adam_weight_decay=0.0)
    optimizer = build_optimizer([ParameterGroup(weights)], options, torch.device("cpu"))
    for weight in weights:
        weight.grad = 1e-4 * torch.randn(weight.shape, generator=generator)
    optimizer.step()
    for weight, start in zip(weights, starts, strict=True):
        assert (weight.detach() - start).square().mean().sqrt().item() == pytest.approx(1e-3, rel=0.15)


def test_absent_optimizer_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match=r"diffalign\[quant\]"):
        build_optimizer([], OptimOptions(optimizer="adamw8bit"), torch.device("cpu"))


def test_clipping_by_group() -> None:
    together, rows = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(2))
    together.grad = torch.tensor([[3.0, 0.0], [0.0, 4.0]])
    rows.grad = torch.tensor([[0.0, 12.0], [0.3, 0.4]])
    groups = [ParameterGroup([together]), ParameterGroup([rows], clip="per_row")]
    norm = clip_gradients(groups, 1.0)
    assert norm.item() == pytest.approx(math.sqrt(25 + 144 + 0.25))
    assert together.grad.norm().item() == pytest.approx(1.0, rel=1e-5)
    assert torch.allclose(rows.grad, torch.tensor([[0.0, 1.0], [0.3, 0.4]]))


def test_clipping_switched_off_only_measures() -> None:
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients([ParameterGroup([p])], 0.0).item() == pytest.approx(5.0)
    assert p.grad.tolist() == [3.0, 4.0]


def test_moving_average() -> None:
    policy = ToyPolicy()
    trainables = Trainables(PolicyInDraw(), policy)
    average = MovingAverage(trainables, decay=0.5)
    start = policy.adapters.vector().detach().clone()
    with torch.no_grad():
        policy.adapters.vector().add_(1.0)
    average.update(step=100)
    assert torch.allclose(average.state_dict()["vectors.default"], start + 0.5)
    with average.applied():
        assert torch.allclose(policy.adapters.vector(), start + 0.5)
    assert torch.allclose(policy.adapters.vector(), start + 1.0)


def test_early_averages_follow_quickly() -> None:
    policy = ToyPolicy()
    average = MovingAverage(Trainables(PolicyInDraw(), policy), decay=0.9999)
    start = policy.adapters.vector().detach().clone()
    with torch.no_grad():
        policy.adapters.vector().add_(1.0)
    average.update(step=1)
    assert torch.allclose(average.state_dict()["vectors.default"], start + 1 - 2 / 11)


def test_nothing_to_train() -> None:
    policy = ToyPolicy()
    policy.module.requires_grad_(False)
    with pytest.raises(UserError, match="nothing to train"):
        Trainables(PolicyInDraw(), policy)


def test_half_precision_weights_are_not_trained(tmp_path: Path) -> None:
    policy = ToyPolicy()
    policy.module.vectors["default"].data = torch.zeros(2, dtype=torch.float16)
    with pytest.raises(UserError, match="must be float32"):
        Trainables(PolicyInDraw(), policy)


def guards(**options: float) -> Guards:
    return Guards(**{"patience": 3, "spike_factor": 5.0, "max_skipped": 2, **options})  # type: ignore[arg-type]


def test_zeros_must_be_consecutive() -> None:
    guard = guards()
    for gradient in (0.0, 0.0, 1.0, 0.0, 0.0):
        guard.judge(1.0, gradient)
    with pytest.raises(RunStopped, match="3 consecutive steps"):
        guard.judge(1.0, 0.0)


def test_non_finite_gradients_are_skipped_then_stop() -> None:
    guard = guards()
    assert guard.judge(1.0, math.nan) == "skip"
    assert guard.judge(1.0, math.inf) == "skip"
    with pytest.raises(RunStopped, match="not finite"):
        guard.judge(1.0, math.nan)


def test_overflow_while_the_scaler_adapts_is_no_failure() -> None:
    guard = guards()
    assert [guard.judge(1.0, math.inf, scaler_adapts=True) for _ in range(10)] == ["skip"] * 10


def test_spikes_are_skipped_then_stop() -> None:
    guard = guards()
    for _ in range(19):
        assert guard.judge(1.0, 1.0) == "apply"
    assert guard.judge(1.0, 100.0) == "apply"  # too early to know what is usual
    assert guard.judge(1.0, 6.0) == "skip"
    assert guard.judge(1.0, 4.0) == "apply"
    with pytest.raises(RunStopped, match="lower --learning_rate"):
        guard.judge(1.0, 6.0)


def test_guards_remember_across_a_resume() -> None:
    guard, other = guards(), guards()
    for _ in range(30):
        guard.judge(1.0, 1.0)
    other.load_state_dict(guard.state_dict())
    assert other.judge(1.0, 6.0) == "skip"
    assert other.skipped == 1
