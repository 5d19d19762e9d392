"""ReNO in the training loop: what is trained is the initial noise of each caption, all weights are frozen.

Paper: Eyring et al., "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization", NeurIPS
2024, arXiv 2406.04312. Official code: https://github.com/ExplainableML/ReNO.

For the noise z of D numbers and norm n, and the image G(z, c) that a one- or few-step model makes of it::

    loss of a caption = -R(G(z, c), c) + norm_weight (0.5 n^2 - (D - 1) log n)

The captions of a batch are searched side by side for ``iterations`` optimizer steps, each with a gradient of its own,
clipped by its own norm; then the next batch begins, with fresh noise and an optimizer that remembers nothing. The
best image seen, by its reward alone and the start included, is kept with its noise: ``images/`` in the run folder. No
weights are written. Official code steps with ``--optimizer sgd --sgd_momentum 0.9 --learning_rate 5
--max_grad_norm 0.1``.

``diffalign.optimize_noise`` is the same search as a Python call, also for pipelines that cannot be trained here, and
``eval/reno.py`` sets best-of-n beside it. Noise is searched by one process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffalign.batch import ImageBatch
from diffalign.errors import UserError
from diffalign.inference.noise_generators import PolicyGenerator
from diffalign.inference.noise_judge import Found, Judge
from diffalign.inference.noise_result import NoiseResult
from diffalign.inference.noise_search import noise_loss, norm_penalty
from diffalign.inference.one_step import Sampling
from diffalign.strategies.base import (
    Context,
    LossOutput,
    ParameterGroup,
    Piece,
    Spec,
    Strategy,
    Terms,
    Update,
)
from diffalign.strategies.registry import register


@dataclass(frozen=True)
class ReNOConfig:
    """Constants of ReNO.

    Args:
        iterations: optimizer steps of a search, each one image. 50: official code.
        rollout_steps: denoising steps of an image. 1: official code.
        rollout_guidance_scale: guidance of the images; 1 switches it off. 1: official code.
        norm_weight: weight of the penalty on the norm of the noise. 0.01: official code.
    """

    iterations: int = 50
    rollout_steps: int = 1
    rollout_guidance_scale: float = 1.0
    norm_weight: float = 0.01

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise UserError(f"iterations is {self.iterations}: expected 1 at least")
        if self.norm_weight < 0:
            raise UserError(f"norm_weight is {self.norm_weight}: expected 0 or more")

    def sampling(self, resolution: tuple[int, int] | None = None) -> Sampling:
        """Return how images are made, of (height, width) pixels or of the model's own size."""
        return Sampling(self.rollout_steps, self.rollout_guidance_scale, resolution=resolution)


@dataclass(frozen=True)
class _Search:
    """What came of a caption."""

    prompt: str
    seed: int
    found: Found


@register(
    "reno",
    summary="the initial noise of each caption climbs a reward; no weights are trained",
    paper="ReNO: Reward-based Noise Optimization of One-step Text-to-Image Models (arXiv 2406.04312)",
    repository="https://github.com/ExplainableML/ReNO",
    family="inference time",
)
class ReNO(Strategy):
    """Searches noise."""

    spec = Spec(
        data="prompts",
        needs_reference=False,
        bundled_model="tiny-sd-turbo",
        needs_reward="differentiable",
        trains="own",
        lockstep="none",
        waived_guards={"spike": "every batch of captions is a search of its own"},
    )
    Config = ReNOConfig

    def __init__(self, config: ReNOConfig) -> None:
        self.config = config
        self._noise: list[nn.Parameter] = []
        self._searches: list[_Search] = []
        self._judge: Judge | None = None
        self._iteration = 0

    @property
    def updates_per_batch(self) -> int:
        """Iterations of a search."""
        return int(self.config.iterations)

    @property
    def found(self) -> list[Found]:
        """The best image of every caption so far."""
        return [search.found for search in self._searches]

    def build(self, ctx: Context) -> None:
        """Make room for the noise of a batch.

        Raises:
            UserError: for several processes.
        """
        if ctx.world_size > 1:
            raise UserError("noise is searched by one process: give each a part of the captions, or run eval/reno.py")
        self._noise = [
            nn.Parameter(torch.zeros(1, *ctx.latent_shape, device=ctx.device)) for _ in range(ctx.global_batch)
        ]

    def parameters(self) -> list[ParameterGroup]:
        """The noise, each caption's clipped by its own norm."""
        return [ParameterGroup(self._noise, clip="per_row")]

    def collect(self, ctx: Context, batches: Sequence[ImageBatch]) -> Iterator[Update]:  # type: ignore[override]
        """Start from fresh noise; then update after update, until the iterations are used up."""
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        metadata = [row for batch in batches for row in batch.metadata]
        seeds = [seed for batch in batches for seed in batch.seeds.tolist()]
        generator = PolicyGenerator(ctx.policy, prompts, self.config.sampling(ctx.resolution))
        self._judge = Judge(generator, ctx.reward, prompts, metadata or None)
        self._searches += [_Search(*row) for row in zip(prompts, seeds, self._judge.found, strict=True)]
        with torch.no_grad():
            for noise, start in zip(self._noise, generator.draw(seeds), strict=False):
                noise.copy_(start[None])
        numbered, first = [], 0
        for batch in batches:
            rows = torch.arange(first, first + batch.size)
            numbered.append(replace(batch, fields={**batch.fields, "search": rows}))
            first += batch.size
        for iteration in range(self.config.iterations):
            self._iteration = iteration
            # weight 1: the gradient of a caption is its own, however many stand beside it
            yield Update(numbered, weight=1.0, restart=iteration == 0)

    def draw(self, ctx: Context, batch: ImageBatch) -> list[int]:
        """Return which searches a batch belongs to."""
        return [int(row) for row in batch.fields["search"]]

    def pieces(self, ctx: Context, batch: ImageBatch, draws: list[int]) -> list[Piece]:
        """As few as ``ctx.max_rows`` allows."""
        size = ctx.max_rows or len(draws)
        return [Piece(rows=slice(start, start + size)) for start in range(0, len(draws), size)]

    def terms(self, ctx: Context, batch: ImageBatch, draws: list[int], piece: Piece) -> Tensor:
        """Rewards, and penalties of the norm, (rows, 2) float32."""
        assert self._judge is not None
        rows = draws[piece.rows or slice(None)]
        noise = torch.cat([self._noise[row] for row in rows])
        look = self._judge.look(noise, rows, self._iteration)
        self._judge.keep(look)
        return torch.stack([look.totals, norm_penalty(noise)], dim=1)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Return the mean over captions."""
        totals, penalties = terms.policy.unbind(dim=1)
        losses = noise_loss(totals, penalties, self.config.norm_weight)
        return LossOutput(losses.mean(), {"loss": losses.detach(), "reward": totals.detach()})

    def state_dict(self) -> dict[str, Any]:
        """What was found so far."""
        return {"searches": [self._record(search) for search in self._searches]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave; images are made again from their noise where they are wanted."""
        if state.keys() != {"searches"}:
            raise ValueError(f"not a checkpoint of this method: it holds {sorted(state)}")
        self._searches = [
            _Search(record["prompt"], record["seed"], Found(**{name: record[name] for name in _KEPT}))
            for record in state["searches"]
        ]

    def export(self, ctx: Context, folder: Path) -> None:
        """Write the best image of every caption, its noise, and the course of its search."""
        for index, search in enumerate(self._searches):
            generator = PolicyGenerator(ctx.policy, [search.prompt], self.config.sampling(ctx.resolution))
            noise = torch.stack([search.found.noise.to(ctx.device), generator.draw([search.seed])[0]])
            with ctx.policy.inference():
                image, first = generator(noise, [0, 0])
            found = replace(search.found, image=image, first_image=first)
            NoiseResult.of(found, search.prompt, search.seed).save(folder / "images", f"{index:05d}")

    @staticmethod
    def _record(search: _Search) -> dict[str, Any]:
        kept = {name: getattr(search.found, name) for name in _KEPT}
        return {"prompt": search.prompt, "seed": search.seed, **kept}


_KEPT = ("noise", "total", "iteration", "history")
"""What a checkpoint holds of a search."""
