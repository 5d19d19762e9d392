"""Weights make errors of one prediction type those of another."""

from __future__ import annotations

import pytest
import torch

from diffalign.diffusion.process import DiscreteProcess, FlowProcess, NoiseProcess
from diffalign.diffusion.weighting import error_weights
from diffalign.errors import UserError


def process_of(kind: str) -> NoiseProcess:
    return FlowProcess() if kind == "flow" else DiscreteProcess.from_scheduler_config({"prediction_type": kind})


KINDS = ["epsilon", "v_prediction", "sample", "flow"]


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_errors_are_errors_of_image_and_noise(kind: str) -> None:
    process, generator = process_of(kind), torch.Generator().manual_seed(0)
    noisy, prediction, target = torch.randn(3, 3, 2, 4, 4, generator=generator, dtype=torch.float64)
    timesteps = process.timestep_at(torch.tensor([50, 500, 950]))
    level, error = process.level(timesteps), (prediction - target).square().mean((1, 2, 3))
    for weighting, convert in (("x0", process.to_x0), ("epsilon", process.to_epsilon)):
        difference = convert(prediction, noisy, level) - convert(target, noisy, level)
        weights = error_weights(process, timesteps, weighting)  # type: ignore[arg-type]
        torch.testing.assert_close(weights * error, difference.square().mean((1, 2, 3)))


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_follows_the_paper(kind: str) -> None:
    process = process_of(kind)
    timesteps = process.timestep_at(torch.tensor([5, 500, 950]))
    snr = process.snr(timesteps)
    bounded = snr.clamp(max=5.0)
    expected = {
        "epsilon": bounded / snr,
        "v_prediction": bounded / (snr + 1),
        "sample": bounded,
        "flow": bounded * (timesteps.double() / 1000).square(),
    }
    torch.testing.assert_close(error_weights(process, timesteps, "min_snr"), expected[kind])


def test_epsilon_equivalent_weight_of_flow_and_constant() -> None:
    process, timesteps = FlowProcess(), torch.tensor([250.0, 900.0])
    expected = torch.tensor([0.75**2, 0.1**2], dtype=torch.float64)
    torch.testing.assert_close(error_weights(process, timesteps, "epsilon"), expected)
    assert error_weights(process, timesteps).tolist() == [1.0, 1.0]


def test_unknown_weightings_are_refused() -> None:
    with pytest.raises(UserError, match="did you mean 'min_snr'"):
        error_weights(FlowProcess(), torch.tensor([1.0]), "minsnr")  # type: ignore[arg-type]
