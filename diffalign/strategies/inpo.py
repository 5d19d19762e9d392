"""DDIM-InPO: Diffusion-DPO on latents found by inverting the pair's own images.

Paper: Lu et al., "InPO: Inversion Preference Optimization with Reparametrized DDIM for Efficient Diffusion Model
Alignment", CVPR 2025, arXiv 2503.18454. Official code: https://github.com/JaydenLyh/InPO.

Both images are inverted by the current policy, without gradient, up to a timestep t that the pair shares; the noise
``eps*`` that belongs to where they end up is the target (:mod:`diffalign.strategies.inverted_noise`). With err and
ref_err the mean squared errors at those latents, over the elements of an image::

    z    = 0.5 beta ((ref_err_w - err_w) - (ref_err_l - err_l))
    loss = mean over pairs of -log sigmoid(z)

beta is that of Diffusion-DPO, whose docstring gives its conversions by reduction and prediction type.

Departures:

- The inverted latents end at exactly the level of t (``level_matching: exact``). In the official code they end at the
  next level of a grid of ten while target and label use t, which makes the noise at small t several times too large;
  ``official`` does that, for epsilon and v.
- The policy inverts in eval mode. The official code leaves it in training mode, which adapters with dropout would feel.
- Each pair has its own t; the official code takes that of the first pair of a micro-batch (of one).
- Captions stay; the official launcher drops a fifth of them: ``--caption_dropout 0.2``.
- v and flow are ours: the same inversion and target in their own parameterisation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.diffusion.inversion import LevelMatching
from diffalign.strategies.base import Kernel, LossOutput, Spec, Terms
from diffalign.strategies.inverted_noise import InvertedNoise, Inverter
from diffalign.strategies.pair_kernel import DenoisingKernel, draw_timesteps
from diffalign.strategies.pair_loss import PairConfig, PairErrors, PairObjective, PairStrategy
from diffalign.strategies.registry import register


@dataclass(frozen=True)
class InPOConfig(PairConfig):
    """Constants of DDIM-InPO.

    Args:
        beta: inverse temperature on differences of mean errors. 2000: launcher for SD 1.5 (5000 for SDXL).
        num_inversion_steps: moves of a whole inversion; a pair makes the share that its timestep asks for. 10: official
            code.
        inversion_eta: share of the sampler's randomness added after each move, 0 for none. 0.1: official code.
        level_matching: "exact" ends the inversion at the level that is trained; "official" at the next of its grid.
            exact: a departure, see above.
        inverter: network that inverts. policy: official code; with "reference" --pinned_draws can keep the reference's
            errors, yet images are inverted anew at each visit.
    """

    beta: float = 2000.0
    num_inversion_steps: int = 10
    inversion_eta: float = 0.1
    level_matching: LevelMatching = "exact"
    inverter: Inverter = "policy"


@register(
    "inpo",
    summary="pairs, trained on latents found by DDIM inversion of the images; few updates suffice",
    paper="InPO: Inversion Preference Optimization with Reparametrized DDIM (arXiv 2503.18454)",
    repository="https://github.com/JaydenLyh/InPO",
)
class InPO(PairStrategy):
    """Learns from pairs at the latents that the model would have made them from."""

    spec = Spec(data="pairs", lockstep="all_but_draw")
    Config = InPOConfig

    def __init__(self, config: InPOConfig) -> None:
        super().__init__(config)
        self.spec = replace(self.spec, moving_reference=config.inverter == "policy")
        self.objective = PairObjective(config)

    def kernel(self) -> Kernel:
        """Errors at inverted latents."""
        c: InPOConfig = self.config
        drawn = partial(draw_timesteps, floor=c.timestep_floor)
        return DenoisingKernel(
            InvertedNoise(c.num_inversion_steps, c.level_matching, c.inverter, eta=c.inversion_eta, timesteps=drawn)
        )

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Return the mean of ``-log sigmoid(z)`` over the pairs."""
        return self.objective(PairErrors.of(terms))
