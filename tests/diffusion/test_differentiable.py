"""The differentiable sampler: truncation, checkpointing, and the images it makes."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close

from diffalign.diffusion.differentiable import sample_with_gradient
from diffalign.diffusion.guidance import guided
from diffalign.diffusion.process import NoiseProcess
from diffalign.diffusion.sampling import sample
from tests.factories import tiny_sd, toy_process

STEPS = 5
START = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
NOISES = torch.randn(STEPS, 2, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
every_process = pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])


class Network:
    """A smooth network of two numbers that counts its calls."""

    def __init__(self) -> None:
        self.weights = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
        self.calls = 0

    def __call__(self, latents, timesteps):
        self.calls += 1
        time = (timesteps.double() / 1000).reshape(-1, 1, 1, 1)
        return torch.tanh(self.weights[0] * latents + self.weights[1] * time * latents.cos())


def run(network, process: NoiseProcess, live, eta=0.0, **options):
    """Sample and return the images with the gradient of a function of them."""
    grid = process.sampling_grid(STEPS)
    images = sample_with_gradient(
        network, process, START, grid, live, eta=eta, step_noise=lambda move: NOISES[move], **options
    )
    (slope,) = torch.autograd.grad(images.sin().sum(), network.weights)
    return images.detach(), slope


def from_move(k):
    return [index >= k for index in range(STEPS)]


@every_process
def test_images_are_the_samplers_whatever_is_live(kind):
    process, network = toy_process(kind), Network()
    expected = sample(network, process, START, STEPS).detach()
    for k in (0, 2, STEPS - 1):
        assert_close(run(network, process, from_move(k))[0], expected)


@every_process
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_starting_late_equals_constant_predictions_before(kind, eta):
    process, network = toy_process(kind), Network()
    images, slope = run(network, process, from_move(2), eta)
    options = {"eta": eta, "step_noise": lambda move: NOISES[move]}
    with torch.no_grad():
        halfway = sample_with_gradient(network, process, START, process.sampling_grid(STEPS), [False] * 2, **options)
    late = sample_with_gradient(network, process, halfway, process.sampling_grid(STEPS), [True] * 3, first=2, **options)
    assert_close(late.detach(), images)
    assert_close(torch.autograd.grad(late.sin().sum(), network.weights)[0], slope)


@every_process
def test_checkpointing_changes_calls_and_nothing_else(kind):
    process, network = toy_process(kind), Network()
    live = [False, True, False, True, True]
    images, slope = run(network, process, live, eta=0.5)
    assert network.calls == STEPS + 3  # live steps are computed again in backward
    network.calls = 0
    plain, expected = run(network, process, live, eta=0.5, checkpointing=False)
    assert network.calls == STEPS
    assert_close(images, plain, rtol=0, atol=0)
    assert_close(slope, expected, rtol=1e-12, atol=1e-14)


@every_process
def test_the_gradient_is_that_of_finite_differences(kind):
    process, network = toy_process(kind), Network()
    _, slope = run(network, process, from_move(0), eta=0.7)
    for index in range(2):
        values = []
        for sign in (1, -1):
            moved = Network()
            moved.weights.data[index] += sign * 1e-6
            values.append(run(moved, process, from_move(0), eta=0.7)[0].sin().sum())
        assert_close(slope[index], (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=1e-7)


def test_a_step_between_constants_keeps_its_gradient():
    process, network = toy_process("epsilon"), Network()
    only_second = [False, True, False, False, False]
    _, slope = run(network, process, only_second)
    assert slope.abs().max() > 0
    frozen = Network()
    with torch.no_grad():
        images = sample_with_gradient(frozen, process, START, process.sampling_grid(STEPS), only_second)
    assert not images.requires_grad


def test_randomness_needs_its_noise():
    process = toy_process("epsilon")
    with pytest.raises(ValueError, match="noise"):
        sample_with_gradient(Network(), process, START, process.sampling_grid(STEPS), [True], eta=1.0)


def test_the_unconditional_branch_can_be_a_constant():
    policy = tiny_sd(lora=True)
    latents, timesteps = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500, 500])
    captions, null = policy.encode_prompts(["a cat", "two"]), policy.null_condition(2)
    for parameter in policy.adapters.parameters():
        parameter.data.normal_(0, 0.2, generator=torch.Generator().manual_seed(2))
    trained = [p for p in policy.module.parameters() if p.requires_grad]

    def slopes(predict):
        saved = 0

        def count(value):
            nonlocal saved
            saved += value.nbytes
            return value

        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            output = predict(latents, timesteps)
        return output.detach(), torch.autograd.grad(output.square().sum(), trained), saved

    both, through_both, kept = slopes(guided(policy.predict, captions, null, 3.0))
    apart, through_one, half = slopes(guided(policy.predict, captions, null, 3.0, detach_null=True))
    assert half < 0.75 * kept  # weights are kept as well
    assert_close(apart, both, rtol=1e-4, atol=1e-5)
    conditional = policy.predict(latents, timesteps, captions)
    expected = torch.autograd.grad((2 * both * 3.0 * conditional).sum(), trained)
    for got, want in zip(through_one, expected, strict=True):
        assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(through_one, through_both, strict=True))
