"""Where on a trajectory a reward is decided, and which steps the policy gradient hears.

    python benchmarks/step_signal.py [--model tiny-sd] [--reward graded] [--captions 48] [--images 8] [--out FILE]

For each step of a stochastic sampler: the reward's variance among images of a caption that share the initial noise and
all noise up to that step (what is left is decided later); the norm of the policy gradient of that step, over advantages
within captions; and the agreement (mean cosine) of that gradient between four parts of the captions. Steps after which
nothing is undecided teach nothing, however loud their gradient is: ``--trained_steps first`` leaves them out.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jsonargparse import auto_cli
from torch import Tensor

from diffalign.batch import Condition
from diffalign.diffusion.random import derive_seed
from diffalign.policies.adapters import LoraSettings
from diffalign.policies.base import Policy
from diffalign.policies.loading import load_policy
from diffalign.rewards.base import Reward
from diffalign.rewards.loading import load_reward
from diffalign.rollouts.steps import StochasticSteps
from diffalign.rollouts.trajectory import Trajectories, guided_prediction, replay, roll_out
from diffalign.strategies.advantages import group_advantages
from diffalign.world.grammar import PromptRecord, prompts

PARTS = 4
ROWS = 64


@dataclass(frozen=True)
class StepSignal:
    """What is known of a step.

    Args:
        step: its index; 0 starts from noise.
        undecided: variance of the reward within a caption once the noise before this step is shared.
        gradient_norm: of the step's policy gradient, mean over parts of the captions.
        agreement: mean cosine between the gradients of two parts, from -1 to 1.
    """

    step: int
    undecided: float
    gradient_norm: float
    agreement: float


class Probe:
    """Samples images of the same captions in several ways.

    Args:
        policy: with a trainable adapter.
        reward: black box.
        records: captions of the bundled world.
        images: of each caption.
        steps: of the sampler.
        guidance_scale: of the samples.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward,
        records: Sequence[PromptRecord],
        images: int,
        steps: int,
        guidance_scale: float,
    ) -> None:
        self.policy, self.reward, self.records, self.images = policy, reward, records, images
        self.sampler = StochasticSteps(policy.process, steps, 1.0, 0.7, "growing")
        self.guidance_scale = guidance_scale
        self.captions = torch.arange(len(records)).repeat(images)
        self._condition = policy.encode_prompts([record.text for record in records])

    def score(self, latents: Tensor) -> Tensor:
        """Return rewards of final latents, (rows,)."""
        of = [self.records[index] for index in self.captions.tolist()]
        with torch.no_grad(), self.policy.inference():
            parts = [
                self.reward.score(
                    self.policy.decode(latents[start : start + ROWS]).float(),
                    [record.text for record in of[start : start + ROWS]],
                    [record.metadata for record in of[start : start + ROWS]],
                )
                for start in range(0, len(latents), ROWS)
            ]
        return torch.cat(parts).double()

    @torch.no_grad()
    def undecided(self, shared: int) -> float:
        """Return the reward's variance within captions whose images share start and noise of the first steps."""
        generator = torch.Generator().manual_seed(shared)
        shape = tuple(self.policy.latent_shape(*self.policy.default_resolution))

        def noise(common: bool) -> Tensor:
            count = len(self.records) if common else len(self.captions)
            drawn = torch.randn(count, *shape, generator=generator)
            return drawn[self.captions] if common else drawn

        latents = noise(True) * self.sampler.noise_scale
        for step in range(len(self.sampler)):
            drawn = noise(step < shared)
            latents = torch.cat([self._move(step, latents, drawn, rows) for rows in self._blocks()])
        return float(self.score(latents).view(self.images, -1).var(dim=0).mean())

    def _move(self, step: int, latents: Tensor, noise: Tensor, rows: Tensor) -> Tensor:
        with self.policy.inference():
            predict = guided_prediction(self.policy, self._rows(rows), self.guidance_scale)
            timesteps = self.sampler.timesteps(step, len(rows), latents.device)
            moved = self.sampler.transition(step, predict(latents[rows], timesteps), latents[rows])
        return moved.sample(noise[rows])

    def gradients(self, parameters: Sequence[Tensor]) -> Tensor:
        """Return policy gradients, (PARTS, steps, weights), each over one part of the captions."""
        shape = tuple(self.policy.latent_shape(*self.policy.default_resolution))
        seeds = torch.tensor([derive_seed("signal", row) for row in range(len(self.captions))])
        blocks = [
            roll_out(self.policy, self.sampler, self._rows(rows), seeds[rows], shape,
                     guidance_scale=self.guidance_scale)
            for rows in self._blocks()
        ]  # fmt: skip
        rolled = Trajectories.cat(blocks)
        advantages = group_advantages(self.score(rolled.final).float(), self.captions, "batch")
        part_of = self.captions * PARTS // len(self.records)
        total = torch.zeros(PARTS, len(self.sampler), sum(p.numel() for p in parameters))
        for part, step in itertools.product(range(PARTS), range(len(self.sampler))):
            for rows in (part_of == part).nonzero().flatten().split(ROWS):
                density = replay(self.policy, self.sampler, rolled.select(rows), step)
                found = torch.autograd.grad((advantages[rows] * density).sum(), list(parameters))
                total[part, step] += torch.cat([value.flatten() for value in found])
        return total

    def _rows(self, rows: Tensor) -> Condition:
        return self._condition.select(self.captions[rows])

    def _blocks(self) -> tuple[Tensor, ...]:
        return torch.arange(len(self.captions)).split(ROWS)


def measure(probe: Probe, parameters: Sequence[Tensor]) -> list[StepSignal]:
    """Measure every step.

    Args:
        probe: samples and scores.
        parameters: whose gradient is taken.
    """
    gradients = probe.gradients(parameters)
    found = []
    for step in range(len(probe.sampler)):
        pairs = itertools.combinations(gradients[:, step], 2)
        cosines = [float(torch.cosine_similarity(a, b, dim=0)) for a, b in pairs]
        norm = float(gradients[:, step].norm(dim=1).mean())
        found.append(StepSignal(step, probe.undecided(step), norm, sum(cosines) / len(cosines)))
    return found


def step_signal(
    model: str = "tiny-sd",
    reward: str = "graded",
    captions: int = 48,
    images: int = 8,
    steps: int = 8,
    guidance_scale: float = 3.0,
    out: Path | None = None,
) -> None:
    """Print the signal of every step.

    Args:
        model: bundled name, folder or hub name.
        reward: name of a reward.
        captions: of the bundled world's train split.
        images: of each caption.
        steps: of the sampler.
        guidance_scale: of the samples.
        out: JSON file for the figures.
    """
    policy = load_policy(model)
    policy.adapters.add("policy", LoraSettings(rank=16))
    policy.adapters.activate("policy")
    # a new adapter is zero, and only the second of its factors has a gradient
    parameters = [p for name, p in policy.module.named_parameters() if p.requires_grad and "lora_B" in name]
    probe = Probe(policy, load_reward(reward), prompts("train", captions, seed=11), images, steps, guidance_scale)
    rows: list[dict[str, Any]] = []
    print(f"{'step':>4} {'undecided':>10} {'gradient':>9} {'agreement':>9}")
    for signal in measure(probe, parameters):
        rows.append(asdict(signal))
        print(f"{signal.step:4d} {signal.undecided:10.4f} {signal.gradient_norm:9.3g} {signal.agreement:9.3f}")
    if out is not None:
        out.write_text(json.dumps(rows, indent=1), encoding="utf-8")


if __name__ == "__main__":
    auto_cli(step_signal, as_positional=False)
