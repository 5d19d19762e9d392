"""ReNO's search on a generator given by a formula: penalty, steps, best image, rows that know nothing of each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffalign.errors import UserError
from diffalign.inference.noise_judge import Judge, Look, best_of_noises
from diffalign.inference.noise_search import NoiseSearch, SearchSettings, noise_loss, norm_penalty
from diffalign.rewards.combine import WeightedSum
from diffalign.rewards.function import FunctionReward

NOISE = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
MIXING = torch.randn(32, 27, generator=torch.Generator().manual_seed(1)) / 4
PROMPTS = ["a", "b", "c"]


def generate(noise: Tensor, rows: Sequence[int]) -> Tensor:
    return torch.sigmoid(noise.flatten(1) @ MIXING).reshape(-1, 3, 3, 3)


def redness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return 10 * images[:, 0].flatten(1).mean(1)


def smoothness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return -images.flatten(1).var(1)


def reward(**weights: float) -> WeightedSum:
    parts = {
        "red": FunctionReward(redness, "red", differentiable=True),
        "smooth": FunctionReward(smoothness, "smooth", differentiable=True),
        "flat": FunctionReward(lambda images, prompts: images.flatten(1).sum(1) * 0 + 1, "flat", differentiable=True),
        "blind": FunctionReward(redness, "blind"),
    }
    return WeightedSum({name: parts[name] for name in weights}, weights)


def search(noise: Tensor = NOISE, prompts: Sequence[str] = PROMPTS, callback: Any = None, **settings: Any) -> Any:
    judged = settings.pop("reward", reward(red=1.0, smooth=0.5))
    return NoiseSearch(generate, judged, SearchSettings(**settings))(noise, prompts, callback=callback)


def test_the_penalty_is_least_at_the_typical_norm() -> None:
    noise = NOISE.double().requires_grad_()
    (slope,) = torch.autograd.grad(norm_penalty(noise).sum(), noise)
    squares = noise.detach().flatten(1).square().sum(1)
    expected = (1 - 31 / squares)[:, None, None, None] * noise.detach()
    assert_close(slope, expected)
    for scale, sign in ((0.5, -1), (2.0, 1)):  # pushed outwards from inside, inwards from outside
        start = (NOISE.double() * scale * math.sqrt(31) / NOISE.flatten(1).norm(dim=1)[:, None, None, None]).detach()
        start.requires_grad_()
        (slope,) = torch.autograd.grad(norm_penalty(start).sum(), start)
        assert (sign * (slope * start).flatten(1).sum(1) > 0).all()
    assert norm_penalty(NOISE.half()).dtype == torch.float32


def test_without_penalty_and_gradient_the_noise_stays() -> None:
    looks: list[Look] = []
    search(callback=looks.append, steps=4, norm_weight=0.0, reward=reward(flat=1.0))
    assert all(torch.equal(look.noise, NOISE) for look in looks)


def test_the_start_counts_among_the_images() -> None:
    for rate in (5.0, 500.0):
        for row, found in enumerate(search(steps=10, learning_rate=rate)):
            assert found.total == max(found.history["total"])
            assert found.history["total"][found.iteration] == found.total
            first = reward(red=1.0, smooth=0.5).score(generate(NOISE[row : row + 1], [row]), [""])
            assert found.history["total"][0] == pytest.approx(first.item(), rel=1e-5)
            assert_close(found.image, generate(found.noise[None], [row])[0])
            assert_close(found.first_image, generate(NOISE[row : row + 1], [row])[0])
            assert found.generations == 10
    assert search(steps=10)[0].total > search(steps=1)[0].total


def test_one_iteration_is_the_plain_generation() -> None:
    for row, found in enumerate(search(steps=1)):
        assert torch.equal(found.noise, NOISE[row])
        assert found.iteration == 0


def test_the_first_step_has_the_length_that_clipping_and_momentum_give() -> None:
    looks: list[Look] = []
    search(NOISE[:1], ["a"], looks.append, steps=2, learning_rate=5.0)
    moved = (looks[1].noise - looks[0].noise).norm()
    assert moved.item() == pytest.approx(5.0 * 0.1 * 1.9, rel=1e-4)
    looks.clear()
    search(NOISE[:1], ["a"], looks.append, steps=2, learning_rate=5.0, max_grad_norm=0.0, momentum=0.0)
    leaf = NOISE[:1].clone().requires_grad_()
    loss = 0.01 * norm_penalty(leaf) - reward(red=1.0, smooth=0.5).score(generate(leaf, [0]), ["a"])
    assert_close(looks[1].noise, NOISE[:1] - 5.0 * torch.autograd.grad(loss.sum(), leaf)[0])


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("max_rows", [0, 1, 2])
def test_rows_know_nothing_of_each_other(optimizer: str, max_rows: int) -> None:
    together = search(steps=6, optimizer=optimizer, max_rows=max_rows)
    for row, found in enumerate(together):
        (alone,) = search(NOISE[row : row + 1], [PROMPTS[row]], steps=6, optimizer=optimizer)
        assert_close(found.noise, alone.noise, rtol=1e-4, atol=1e-5)
        assert found.history["total"] == pytest.approx(alone.history["total"], rel=1e-5)


def test_a_search_ends_when_nothing_improves() -> None:
    options = {"steps": 40, "learning_rate": 300.0, "max_grad_norm": 1.0}
    found, whole = search(**options, patience=3), search(**options)
    assert all(row.generations == min(row.iteration + 4, 40) for row in found)
    assert any(row.generations < 40 for row in found)
    for row, other in zip(found, whole, strict=True):
        assert row.history["total"] == pytest.approx(other.history["total"][: row.generations], rel=1e-5)


@pytest.mark.parametrize(
    ("options", "step"),
    [
        ({}, lambda g: 1.9 * g),
        ({"nesterov": False}, lambda g: g),
        ({"optimizer": "adam"}, lambda g: g / (g.abs() + 1e-2)),
        ({"optimizer": "adam", "adam_epsilon": 1e-8}, torch.sign),
    ],
)
def test_the_first_step_is_that_of_the_optimizer(options: dict[str, Any], step: Callable[[Tensor], Tensor]) -> None:
    looks: list[Look] = []
    search(callback=looks.append, steps=2, learning_rate=0.5, max_grad_norm=0.0, **options)
    leaf = NOISE.clone().requires_grad_()
    totals = reward(red=1.0, smooth=0.5).score(generate(leaf, [0, 1, 2]), PROMPTS)
    noise_loss(totals, norm_penalty(leaf), 0.01).sum().backward()
    assert leaf.grad is not None
    assert_close(looks[1].noise, NOISE - 0.5 * step(leaf.grad), atol=1e-5, rtol=1e-4)


def test_a_callback_sees_every_iteration_and_can_end_the_search() -> None:
    looks: list[Look] = []

    def watch(look: Look) -> bool:
        looks.append(look)
        return look.iteration == 2

    found = search(callback=watch, steps=10)
    assert [look.iteration for look in looks] == [0, 1, 2]
    assert looks[0].improved.all()
    assert not looks[0].images.requires_grad
    assert set(looks[0].scores) == {"red", "smooth"}
    assert all(row.generations == 3 for row in found)


def test_weights_are_left_without_gradients() -> None:
    layer = torch.nn.Linear(32, 27)
    before = {name: value.clone() for name, value in layer.state_dict().items()}

    def linear(noise: Tensor, rows: Sequence[int]) -> Tensor:
        return torch.sigmoid(layer(noise.flatten(1))).reshape(-1, 3, 3, 3)

    NoiseSearch(linear, reward(red=1.0), SearchSettings(steps=3))(NOISE, PROMPTS)
    assert all(parameter.grad is None for parameter in layer.parameters())
    assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())


def test_the_best_of_several_noises() -> None:
    judge = Judge(generate, reward(red=1.0, blind=1.0), PROMPTS)
    draws = torch.randn(5, 3, 2, 4, 4, generator=torch.Generator().manual_seed(5))
    found = best_of_noises(judge, lambda draw: draws[draw], 5, max_rows=2)
    totals = torch.stack([2 * redness(generate(draws[draw], [0]), PROMPTS) for draw in range(5)])
    assert [row.iteration for row in found] == totals.argmax(0).tolist()
    assert [row.generations for row in found] == [5, 5, 5]
    assert_close(found[1].noise, draws[found[1].iteration, 1])


def test_mistakes_are_refused() -> None:
    with pytest.raises(UserError, match="blind has none"):
        search(reward=reward(red=1.0, blind=1.0))
    for name, value in {"steps": 0, "learning_rate": 0.0, "momentum": 1.0, "norm_weight": -1.0, "patience": -1}.items():
        with pytest.raises(UserError, match=name):
            SearchSettings(**{name: value})
    broken = FunctionReward(lambda images, prompts: images.flatten(1).sum(1) * math.nan, "nan", differentiable=True)
    with pytest.raises(UserError, match="'broken' is not finite for 'a' at iteration 0"):
        search(reward=WeightedSum({"broken": broken}, {"broken": 1.0}))
