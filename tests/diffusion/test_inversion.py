"""Inversion: its exact cases, its error, its stops, and that nothing but its own row decides a row's path."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from diffusers import DDIMInverseScheduler
from torch import Tensor

from diffalign.diffusion.inversion import FixedPoint, Refinement, invert_path, invert_to, round_trip_error
from diffalign.diffusion.ladders import exact_ladder, official_ladder, sampling_ladder
from diffalign.diffusion.process import DiscreteProcess, FlowProcess, NoiseProcess
from diffalign.errors import UserError

CONFIG = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "steps_offset": 1,
    "clip_sample": False,
    "set_alpha_to_one": False,
}


def discrete(**config: Any) -> DiscreteProcess:
    return DiscreteProcess.from_scheduler_config({**CONFIG, **config})


ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "steps_offset": 0,
}
PROCESSES: dict[str, NoiseProcess] = {
    "epsilon": discrete(),
    "v_prediction": discrete(prediction_type="v_prediction"),
    "sample": discrete(prediction_type="sample"),
    "zero_snr": discrete(**ZERO_SNR),
    "flow": FlowProcess(shift=3.0, sigma_spacing="uniform"),
}


def latents(rows: int = 3, seed: int = 0) -> Tensor:
    return torch.randn(rows, 2, 3, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def smooth(x: Tensor, timesteps: Tensor) -> Tensor:
    """A smooth stand-in for a denoiser."""
    time = (timesteps.to(x) / 1000).reshape(-1, 1, 1, 1)
    return 0.3 * x.sin() + 0.2 * time * x - 0.1 * time


def stops(process: NoiseProcess, *indices: int) -> Tensor:
    return process.timestep_at(torch.tensor(indices))


@pytest.mark.parametrize("refinement", [None, Refinement(FixedPoint(3))], ids=["naive", "refined"])
@pytest.mark.parametrize("label", ["destination", "source"])
def test_constant_noise_and_constant_velocity_are_inverted_exactly(label: Any, refinement: Refinement | None) -> None:
    constant = latents(1, seed=5)
    for process in (discrete(set_alpha_to_one=True), FlowProcess(shift=3.0)):
        timesteps = stops(process, 0, 57, 999)
        for rung in exact_ladder(process, timesteps, 10, label):
            assert rung.labels.dtype == timesteps.dtype
        noisy = invert_to(lambda x, t: constant.expand_as(x), process, latents(), timesteps, 10, refinement=refinement)
        noise = process.noise_from(noisy, latents(), process.level(timesteps))
        velocity = process.from_x0_epsilon(latents(), noise, process.level(timesteps))
        torch.testing.assert_close(velocity, constant.expand_as(noise), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("kind", PROCESSES)
def test_exact_matching_ends_at_the_level_of_the_label(kind: str) -> None:
    process = PROCESSES[kind]
    timesteps = stops(process, 2, 450, 999)
    noisy, level = invert_to(smooth, process, latents(), timesteps, 10), process.level(timesteps)
    assert noisy.isfinite().all()
    at, noise = level.like(noisy), process.noise_from(noisy, latents(), level)
    torch.testing.assert_close(at.alpha * latents() + at.sigma * noise, noisy)
    last = exact_ladder(process, timesteps, 10)[-1]
    torch.testing.assert_close(last.destination.sigma, level.sigma)


def test_rows_make_their_share_of_the_moves() -> None:
    process = discrete()
    ladder = exact_ladder(process, torch.tensor([0, 100, 101, 999]), 10)
    made = torch.stack([rung.active for rung in ladder]).sum(0)
    assert made.tolist() == [1, 1, 2, 10]
    assert ladder[0].labels.tolist() == [0, 100, 50, 100]


@pytest.mark.parametrize("matching", ["exact", "official"])
@pytest.mark.parametrize("refinement", [None, Refinement(FixedPoint(1, (0, 2)), early=FixedPoint(3))])
def test_rows_do_not_know_of_each_other(matching: Any, refinement: Refinement | None) -> None:
    process, timesteps = discrete(), torch.tensor([3, 420, 870])
    options = {"level_matching": matching, "refinement": refinement}
    together = invert_to(smooth, process, latents(), timesteps, 10, **options)
    for row in range(3):
        one = slice(row, row + 1)
        alone = invert_to(smooth, process, latents()[one], timesteps[one], 10, **options)
        torch.testing.assert_close(together[one], alone, rtol=1e-12, atol=1e-12)


def test_official_matching_stops_where_the_published_code_does() -> None:
    process = discrete()
    ladder = official_ladder(process, torch.tensor([999]), 10)
    assert [int(rung.labels) for rung in ladder] == [-99, 1, 101, 201, 301, 401, 501, 601, 701, 801]
    for timestep, reached in [(0, 1), (1, 1), (2, 101), (101, 101), (450, 501), (999, 901)]:
        last = official_ladder(process, torch.tensor([timestep]), 10)[-1]
        torch.testing.assert_close(last.destination.alpha, process.level(torch.tensor([reached])).alpha)
    torch.testing.assert_close(ladder[0].source.alpha, process.level(torch.tensor([0])).alpha)


def test_number_of_network_calls() -> None:
    calls: list[Tensor] = []

    def counted(x: Tensor, timesteps: Tensor) -> Tensor:
        calls.append(timesteps)
        return smooth(x, timesteps)

    process, timesteps = discrete(), torch.tensor([450])
    for matching, refinement, expected in [
        ("exact", None, 5),
        ("official", None, 6),
        ("official", Refinement(FixedPoint(1, (0, 2))), 12),
        ("exact", Refinement(FixedPoint(1), early=FixedPoint(4), early_below=100), 1 * 5 + 4 * 2),
    ]:
        calls.clear()
        invert_to(counted, process, latents(1), timesteps, 10, level_matching=matching, refinement=refinement)
        assert len(calls) == expected


@pytest.mark.parametrize("kind", PROCESSES)
def test_naive_round_trip_error_falls_with_steps_and_a_fixed_point_has_none(kind: str) -> None:
    process = PROCESSES[kind]
    network = smooth if kind != "sample" else lambda x, t: 0.8 * x + 0.1 * smooth(x, t)
    errors = [float(round_trip_error(network, process, latents(), n).max()) for n in (10, 20, 40)]
    assert all(0.35 < after / before < 0.65 for before, after in pairwise(errors))
    converged = round_trip_error(network, process, latents(), 10, refinement=Refinement(FixedPoint(40)))
    assert float(converged.max()) < 1e-7


def test_no_extra_pass_is_naive_inversion() -> None:
    process = discrete()
    naive = invert_path(smooth, process, latents(), 5).latents[-1]
    torch.testing.assert_close(
        invert_path(smooth, process, latents(), 5, refinement=Refinement()).latents[-1], naive, rtol=0, atol=0
    )


def test_averaging_predictions_that_ignore_the_latents_is_plain_inversion() -> None:
    process, timesteps = discrete(), torch.tensor([450])

    def blind(x: Tensor, t: Tensor) -> Tensor:
        return (t.to(x) / 1000).reshape(-1, 1, 1, 1).expand_as(x)

    plain = invert_to(blind, process, latents(1), timesteps, 10)
    averaged = invert_to(blind, process, latents(1), timesteps, 10, refinement=Refinement(FixedPoint(1, (0, 2))))
    torch.testing.assert_close(averaged, plain)


def test_an_average_over_no_pass_keeps_the_last_one() -> None:
    process = discrete()
    paths = [
        invert_path(smooth, process, latents(), 5, refinement=Refinement(FixedPoint(1, average))).latents[-1]
        for average in (None, (8, 10))
    ]
    torch.testing.assert_close(*paths, rtol=0, atol=0)


def test_parameterisations_of_one_network_give_one_path() -> None:
    """The naive path agrees to rounding, for conversions are made at the level that the latents really have."""
    epsilon, timesteps = discrete(), torch.tensor([450, 450, 450])
    expected = None
    for kind in ("epsilon", "v_prediction", "sample"):
        process, ladder = discrete(prediction_type=kind), exact_ladder(epsilon, timesteps, 10)
        moves = iter(ladder)

        def wrapped(x: Tensor, t: Tensor, process: NoiseProcess = process, moves: Any = moves) -> Tensor:
            source, noise = next(moves).source, smooth(x, t)
            return process.from_x0_epsilon(epsilon.to_x0(noise, x, source), noise, source)

        noisy = invert_to(wrapped, process, latents(), timesteps, 10)
        expected = noisy if expected is None else expected
        torch.testing.assert_close(noisy, expected, rtol=1e-9, atol=1e-9)


def test_added_noise_has_the_published_size_and_follows_its_source() -> None:
    process, timesteps, size = discrete(), torch.tensor([1, 1, 1]), latents()
    zero = invert_to(lambda x, t: torch.zeros_like(x), process, size, timesteps, 10, level_matching="official")
    noisy = invert_to(
        lambda x, t: torch.zeros_like(x),
        process,
        size,
        timesteps,
        10,
        level_matching="official",
        eta=0.1,
        step_noise=lambda index: torch.ones_like(size),
    )
    start, end = process.alphas_cumprod[[0, 1]].tolist()
    expected = 0.1 * math.sqrt((1 - start) / (1 - end) * (1 - end / start))
    torch.testing.assert_close(noisy - zero, torch.full_like(size, expected), rtol=1e-6, atol=1e-9)


def test_a_generator_makes_noisy_inversion_repeatable() -> None:
    process, timesteps = discrete(), torch.tensor([100, 400, 900])

    def run(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return invert_to(smooth, process, latents(), timesteps, 10, eta=0.1, generator=generator)

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    with pytest.raises(UserError, match="generator or step_noise"):
        invert_to(smooth, process, latents(), timesteps, 10, eta=0.1)


def test_no_gradient_enters_the_inversion() -> None:
    weight = torch.ones(1, dtype=torch.float64, requires_grad=True)
    noisy = invert_to(lambda x, t: weight * smooth(x, t), discrete(), latents(), torch.tensor([1, 5, 700]), 10)
    path = invert_path(lambda x, t: weight * smooth(x, t), discrete(), latents(), 3)
    assert not noisy.requires_grad
    assert not any(tensor.requires_grad for tensor in [*path.latents, *path.predictions])


@pytest.mark.parametrize("kind", PROCESSES)
def test_a_path_is_its_own_record(kind: str) -> None:
    """Moves can be made again from what the path holds, and the sampler's grid is its mirror."""
    process = PROCESSES[kind]
    path, grid = invert_path(smooth, process, latents(), 6), process.sampling_grid(6)
    assert len(path.latents) == 7
    assert path.timesteps.tolist() == grid.timesteps.flip(0).tolist()
    for move, prediction in enumerate(path.predictions):
        here = slice(move, move + 1)
        source, destination = path.sources.select(here), path.destinations.select(here)
        again = process.move(prediction, path.latents[move], source, destination)
        torch.testing.assert_close(again, path.latents[move + 1], rtol=0, atol=0)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_naive_inversion_clips_on_request_as_the_inverse_scheduler_does(prediction_type: str) -> None:
    config = {**CONFIG, "prediction_type": prediction_type, "clip_sample": True, "clip_sample_range": 0.7}
    scheduler = DDIMInverseScheduler(**config)
    scheduler.set_timesteps(5)
    start = expected = latents()
    for timestep in scheduler.timesteps:
        expected = scheduler.step(smooth(expected, timestep.expand(3)), timestep, expected).prev_sample
    process = discrete(**config)
    path = invert_path(smooth, process, start, 5, clip=True)
    torch.testing.assert_close(path.latents[-1], expected, rtol=1e-5, atol=1e-5)
    unbounded = discrete(prediction_type=prediction_type)
    assert torch.equal(
        invert_path(smooth, process, start, 5).latents[-1], invert_path(smooth, unbounded, start, 5).latents[-1]
    )


def test_source_labels() -> None:
    flow, old = PROCESSES["flow"], discrete()
    labels = [rung.labels[0].item() for rung in sampling_ladder(old, 1, 10, "source")]
    assert labels == [-99, 1, 101, 201, 301, 401, 501, 601, 701, 801]
    labels = [rung.labels[0].item() for rung in sampling_ladder(flow, 1, 4, "source")]
    assert labels == pytest.approx([0, 500, 750, 900])


def test_unknown_names_and_official_flow_are_refused() -> None:
    with pytest.raises(UserError, match="level matching"):
        invert_to(smooth, discrete(), latents(), torch.tensor([1, 2, 3]), 10, level_matching="exactly")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="label"):
        invert_path(smooth, discrete(), latents(), 4, label="middle")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="exact matching"):
        official_ladder(FlowProcess(), torch.tensor([500.0]), 10)
