"""Where a denoiser is trained, found by inverting the images themselves instead of noising them at random.

InPO and SmPO share this noiser. The images of an example share a timestep t; each is inverted without gradient up to
it, and the noise that would have led there is the target::

    x_t  = invert(x0 -> t)
    eps* = (x_t - alpha_t x0) / sigma_t           alpha, sigma: the level of t
    target = what the network should predict for (x0, eps*)

thus ``eps*`` for epsilon, ``alpha eps* - sigma x0`` for v, ``eps* - x0`` for flow. With exact level matching
``alpha_t x0 + sigma_t eps*`` is the inverted latent itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.diffusion.guidance import guided
from diffalign.diffusion.inversion import LevelMatching, Refinement, invert_to
from diffalign.diffusion.random import randn_rows
from diffalign.errors import UserError
from diffalign.policies.base import Policy
from diffalign.strategies.base import Context
from diffalign.strategies.pair_kernel import Noised, draw_timesteps

Inverter = Literal["policy", "reference"]


def draw_step_noise(ctx: Context, batch: ImageBatch, move: int) -> Tensor:
    """Draw the random term of a move, (N * B, channels, ...), for each image on its own."""
    shape = (batch.images_per_example, *batch.latents.shape[1:])
    noise = randn_rows(batch.seeds, shape, f"inversion/{move}", ctx.device)
    return noise.transpose(0, 1).flatten(0, 1)


@dataclass(frozen=True)
class InvertedNoise:
    """A noiser that inverts, with the captions of the batch and without guidance.

    Args:
        num_steps: moves that the whole way up to full noise would take; an image makes its share.
        level_matching: "exact" ends at the level of the drawn timestep; "official" at the next level of a fixed grid.
        inverter: whose predictions lead the way.
        refinement: fixed-point refinement of each move; None for none.
        eta: share of the sampler's randomness added after each move.
        timesteps: draws one timestep an example, (B,).
        step_noise: draws the random term of a move.
    """

    num_steps: int
    level_matching: LevelMatching = "exact"
    inverter: Inverter = "policy"
    refinement: Refinement | None = None
    eta: float = 0.0
    timesteps: Callable[[Context, ImageBatch], Tensor] = draw_timesteps
    step_noise: Callable[[Context, ImageBatch, int], Tensor] = draw_step_noise

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise UserError(f"the number of inversion steps is {self.num_steps}: expected 1 or more")
        if self.eta < 0:
            raise UserError(f"the eta of the inversion is {self.eta}: expected 0 (deterministic) or more")

    def __call__(self, ctx: Context, batch: ImageBatch) -> Noised:
        """Draw timesteps, invert, and take the noise that belongs to where the images end up."""
        process = ctx.policy.process
        timesteps = self.timesteps(ctx, batch).repeat(batch.images_per_example)
        noisy = self._invert(ctx, batch, timesteps)
        level = process.level(timesteps)
        noise = process.noise_from(noisy, batch.latents, level)
        return Noised(noisy, timesteps, process.from_x0_epsilon(batch.latents, noise, level), batch.condition)

    def _invert(self, ctx: Context, batch: ImageBatch, timesteps: Tensor) -> Tensor:
        condition = batch.condition
        with self._network(ctx) as policy, policy.inference():
            return invert_to(
                guided(policy.predict, condition),
                policy.process,
                batch.latents,
                timesteps,
                self.num_steps,
                level_matching=self.level_matching,
                refinement=self.refinement,
                eta=self.eta,
                step_noise=(lambda move: self.step_noise(ctx, batch, move)) if self.eta else None,
                predict_rows=lambda rows: guided(policy.predict, condition.select(rows)),
            )

    def _network(self, ctx: Context) -> AbstractContextManager[Policy]:
        """The policy in the state that inverts."""
        if self.inverter == "policy":
            return nullcontext(ctx.policy)
        assert ctx.reference is not None
        return ctx.reference.active()
