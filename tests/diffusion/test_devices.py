"""Everything happens on the device of the latents, whatever device schedules and ladders live on.

Tensors of the "meta" device hold no numbers but refuse to meet tensors of another device, as those of a GPU do.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from diffalign.diffusion.inversion import FixedPoint, Refinement, climb
from diffalign.diffusion.ladders import exact_ladder
from diffalign.diffusion.process import DiscreteProcess, FlowProcess, NoiseProcess
from diffalign.diffusion.sampling import sample
from diffalign.diffusion.sde import ddim_transition, flow_transition
from diffalign.diffusion.weighting import error_weights

META = torch.device("meta")
PROCESSES = [DiscreteProcess.from_scheduler_config({"prediction_type": "v_prediction"}), FlowProcess(shift=3.0)]


def predict(latents: Tensor, timesteps: Tensor) -> Tensor:
    assert timesteps.device == latents.device
    return latents * timesteps.reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("process", PROCESSES)
def test_results_stay_on_the_device_of_the_latents(process: NoiseProcess) -> None:
    latents = torch.empty(2, 3, 4, 4, device=META, dtype=torch.bfloat16)
    timesteps = process.timestep_at(torch.tensor([5, 700]))
    there = timesteps.to(META)
    level = process.level(there)
    if isinstance(process, FlowProcess):
        transition = flow_transition(latents, latents, level, level, level.sigma)
    else:
        transition = ddim_transition(process, latents, latents, level, level, eta=1.0)
    results = [
        process.add_noise(latents, latents, there),
        process.target(latents, latents, there),
        process.noise_from(latents, latents, level),
        process.clean_level(2, META).sigma,
        error_weights(process, there, "min_snr"),
        sample(predict, process, latents, 3),
        transition.log_prob(transition.sample(latents)),
    ]
    refinement = Refinement(FixedPoint(2), early=FixedPoint(3, (0, 2)))
    for rung in exact_ladder(process, timesteps, 4):
        results += climb(predict, process, latents, rung, refinement)
    assert {result.device for result in results} == {META}
