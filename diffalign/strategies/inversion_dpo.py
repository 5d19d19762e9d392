"""Inversion-DPO: policy and reference compared along the whole path by which an image inverts to noise.

Paper: Li et al., "Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models", ACM MM 2025,
arXiv 2507.11554. Official code: https://github.com/MIGHTYEZ/Inversion-DPO.

No noise is drawn. With D_k and w_k, difference and weight at move k of an image's path of N moves
(:mod:`diffalign.strategies.inversion_path`)::

    S    = sum_k w_k D_k
    z    = sign * 0.5 beta (S_w - S_l) / N
    loss = mean over pairs of -log sigmoid(z)

Which sign is right depends on whose path it is. Along the policy's own, a large D speaks for the policy (sign +1);
along the reference's it speaks against it (sign -1). The official code takes the reference's path with +1, which moves
the policy away from the reference on chosen images. All four combinations exist. The default is the official one: the
paper does not settle which is meant, and on the bundled world none was significantly better (``docs/leaderboard.md``).

The warm start. D is even in (policy - reference): where the two are equal the gradient is exactly zero, and near it the
direction of learning comes only from what set them apart. So the first ``warm_start_steps`` train another objective by
name, ``sft`` on the chosen images or ``diffusion_dpo`` on the pairs, as the metric ``warm_start`` says. Compare with as
much of the warm start alone before crediting the rest. Without one, start from weights that differ from the reference.

beta multiplies means over elements, as in Diffusion-DPO; D of flow models is in velocity and larger.

Departures: the unconditional branch is the encoded empty caption, all zeros only where the model asks for it (zeros for
SDXL in the code); micro-batches of any size; the warm start, where the official run leaves the start to rounding; v and
flow. Gradients are exact whatever ``moves_per_piece``, at the price of one more forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.errors import UserError
from diffalign.strategies.base import Context, Kernel, LossOutput, Piece, Spec, Terms
from diffalign.strategies.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from diffalign.strategies.heads import scale_gradient
from diffalign.strategies.inversion_path import PathDraws, PathKernel, PathOwner
from diffalign.strategies.pair_kernel import Noised
from diffalign.strategies.pair_loss import PairConfig, PairObjective, PairStrategy
from diffalign.strategies.registry import register
from diffalign.strategies.sft import SFT, SFTConfig


@dataclass(frozen=True)
class InversionDPOConfig(PairConfig):
    """Constants of Inversion-DPO.

    Args:
        beta: inverse temperature on differences of mean errors; of the warm start by diffusion_dpo too. 2000: launcher
            for SDXL.
        num_inversion_steps: N, moves of the path. 40: default of the official script (80 in its launcher).
        inversion_guidance_scale: of both networks along the path. 2: official code.
        path: whose inversion makes the path. reference: official code.
        sign: of the logit. 1: official code.
        moves_per_piece: moves whose graphs are held at once. 1: least memory.
        timestep_floor: share of the least noisy timesteps that the warm start leaves out. 0: the papers.
        warm_start: objective of the first steps, "sft" or "diffusion_dpo". sft: ours, see above.
        warm_start_steps: number of those steps. 100: ours.
    """

    beta: float = 2000.0
    num_inversion_steps: int = 40
    inversion_guidance_scale: float = 2.0
    path: PathOwner = "reference"
    sign: Literal[1, -1] = 1
    moves_per_piece: int = 1
    warm_start: Literal["sft", "diffusion_dpo"] = "sft"
    warm_start_steps: int = 100

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, least in (("num_inversion_steps", 1), ("moves_per_piece", 1), ("warm_start_steps", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}: expected {least} or more")


@dataclass(frozen=True)
class Draws:
    """What a micro-batch is evaluated on.

    Args:
        path: the paths; None in the warm start.
        noised: noised images: those of the warm start, or the chosen ones where ``sft_weight`` asks for their errors.
        batch: the batch that ``noised`` belongs to.
    """

    path: PathDraws | None
    noised: Noised | None
    batch: ImageBatch


@register(
    "inversion_dpo",
    summary="pairs compared along their whole inversion paths, after a warm start by name",
    paper="Inversion-DPO: Precise and Efficient Post-Training for Diffusion Models (arXiv 2507.11554)",
    repository="https://github.com/MIGHTYEZ/Inversion-DPO",
)
class InversionDPO(PairStrategy):
    """Learns from where paths of chosen and rejected images part from the reference."""

    spec = Spec(
        data="pairs", waived_guards={"spike": "gradients change in scale where the warm start gives way to the paths"}
    )
    Config = InversionDPOConfig
    glossary: ClassVar[Mapping[str, str]] = {
        "warm_start": "1 while another objective warms the policy up, else 0",
    }

    def __init__(self, config: InversionDPOConfig) -> None:
        super().__init__(config)
        self.objective = PairObjective(config)
        floor = config.timestep_floor
        self._sft = SFT(SFTConfig(timestep_floor=floor))
        pairs = DiffusionDPO(DiffusionDPOConfig(beta=config.beta, timestep_floor=floor))
        self._warm = self._sft if config.warm_start == "sft" else pairs

    def kernel(self) -> Kernel:
        """Comparisons along paths."""
        return PathKernel(self.config.num_inversion_steps, self.config.inversion_guidance_scale, self.config.path)

    def draw(self, ctx: Context, batch: ImageBatch) -> Draws:
        """Noise the images in the warm start; afterwards make their paths."""
        chosen = batch.block(0)
        if ctx.step < self.config.warm_start_steps:
            seen = chosen if self._warm is self._sft else batch
            return Draws(None, self._warm.draw(ctx, seen), seen)
        noised = self._sft.draw(ctx, chosen) if self.config.sft_weight else None
        return Draws(super().draw(ctx, batch), noised, chosen)

    def pieces(self, ctx: Context, batch: ImageBatch, draws: Draws) -> list[Piece]:
        """A few moves of all images each, fewer images where rows are limited; then the chosen images' own errors."""
        if draws.path is None:
            return self._warm.pieces(ctx, draws.batch, draws.noised)
        total, images = len(draws.path.latents), len(batch.latents)
        size = images * self.config.moves_per_piece
        if ctx.max_rows:
            branches = 1 if self.config.inversion_guidance_scale == 1.0 else 2
            size = max(1, min(size, ctx.max_rows // branches))
        pieces = [Piece(rows=slice(start, min(start + size, total))) for start in range(0, total, size)]
        if draws.noised is not None:
            rows = len(draws.noised.latents)
            size = ctx.max_rows or rows
            pieces += [Piece(rows=slice(total + i, total + min(i + size, rows))) for i in range(0, rows, size)]
        return pieces

    def frozen(self, ctx: Context, batch: ImageBatch, draws: Draws, piece: Piece) -> Mapping[str, Tensor]:
        """Weights along the paths; in the warm start what its objective asks."""
        if draws.path is None:
            return self._warm.frozen(ctx, draws.batch, draws.noised, piece)
        supervised = _supervised(draws, piece)
        if supervised is not None:
            images = draws.batch.latents[supervised.rows]
            return {"path_weight": torch.zeros(len(images), 1, device=images.device)}
        return self._kernel.frozen(ctx, batch, draws.path, piece)

    def terms(self, ctx: Context, batch: ImageBatch, draws: Draws, piece: Piece) -> Tensor:
        """D along the paths, (rows, 1); in the warm start, and for ``sft_weight``, errors at noised images."""
        if draws.path is None:
            return self._warm.terms(ctx, draws.batch, draws.noised, piece)
        supervised = _supervised(draws, piece)
        if supervised is not None:
            return self._sft.terms(ctx, draws.batch, draws.noised, supervised)
        return self._kernel.terms(ctx, batch, draws.path, piece)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Return the mean of ``-log sigmoid(z)`` over the pairs, or the loss of the warm start."""
        warm = torch.ones((), device=terms.policy.device)
        if "path_weight" not in terms.frozen:
            output = self._warm.loss(terms, statistics, batch)
            return LossOutput(output.loss, {**output.metrics, "warm_start": warm})
        moves = self.config.num_inversion_steps
        along = 2 * batch.size * moves
        weighted = terms.policy[:along] * terms.frozen["path_weight"][:along]
        s_w, s_l = weighted.view(moves, -1).mean(dim=0).chunk(2)  # S / N, (B,)
        # the gradient at the predictions of a path is as long as the root of this
        lengths = (weighted.detach() * terms.frozen["path_weight"][:along]).view(moves, -1).mean(dim=0).chunk(2)
        margin = self.config.sign * (s_w - scale_gradient(s_l, self.config.rejected_scale(*lengths)))
        output = self.objective.from_margin(margin, terms.policy[along:, 0])
        metrics = {
            "winner_margin": self.config.sign * s_w.detach(),
            "loser_margin": -self.config.sign * s_l.detach(),
            "warm_start": warm - 1,
        }
        return LossOutput(output.loss, {**output.metrics, **metrics})


def _supervised(draws: Draws, piece: Piece) -> Piece | None:
    """Return a piece as one of the chosen images' own rows, which follow the paths'; None if it is of a path."""
    assert draws.path is not None
    first = len(draws.path.latents)
    if piece.rows is None or piece.rows.start < first:
        return None
    return Piece(rows=slice(piece.rows.start - first, piece.rows.stop - first))
