"""Optimising the initial noise of a frozen generator for its rewards: ReNO's mathematics and its loop.

Paper: Eyring et al., "ReNO: Enhancing One-step Text-to-Image Models through Reward-based Noise Optimization", NeurIPS
2024, arXiv 2406.04312. Official code: https://github.com/ExplainableML/ReNO.

For the noise z of D numbers and norm n, and the images G(z, c) of a generator whose weights stay as they are::

    minimise  -sum_j w_j R_j(G(z, c), c)  +  lambda (0.5 n^2 - (D - 1) log n)

The second term is minus the log-density of the norm of standard normal noise. The image that is kept is the one with
the greatest weighted reward; the second term has no say in that. Every row is a search of its own: its gradient is
clipped by its own norm, and neither the other rows nor their number changes anything.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffalign.errors import UserError, require_at_least
from diffalign.inference.noise_judge import Found, Generate, Judge, Look, parts_of
from diffalign.rewards.base import Metadata
from diffalign.rewards.combine import WeightedSum

Callback = Callable[[Look], Any]
"""Called with every iteration; a true answer ends the search."""


def norm_penalty(noise: Tensor) -> Tensor:
    """Return ``0.5 n^2 - (D - 1) log n`` of each row, (rows,), at least in float32; least at ``n = sqrt(D - 1)``.

    Args:
        noise: (rows, channels, ...) of D numbers a row.
    """
    flat = noise.to(torch.promote_types(noise.dtype, torch.float32)).flatten(1)
    norm = flat.norm(dim=1)
    return 0.5 * norm.square() - (flat.shape[1] - 1) * norm.log()


def noise_loss(totals: Tensor, penalties: Tensor, norm_weight: float) -> Tensor:
    """Return what a search minimises, (rows,).

    Args:
        totals: (rows,) weighted rewards of the images.
        penalties: (rows,) of the norm of their noise.
        norm_weight: lambda.
    """
    return norm_weight * penalties - totals


@dataclass(frozen=True)
class SearchSettings:
    """How noise is optimised.

    Args:
        steps: iterations, each one generation. 50: official code.
        learning_rate: 5: official code (10 for HyperSDXL).
        optimizer: "sgd" or "adam". sgd: official code.
        momentum: of "sgd". 0.9: official code.
        nesterov: of "sgd", where it has momentum. True: official code.
        adam_epsilon: of "adam", added to the root of its denominator. 0.01: official code.
        max_grad_norm: bound on the norm of each row's gradient; 0 switches clipping off. 0.1: official code.
        norm_weight: lambda. 0.01: official code.
        patience: end the search of a prompt after so many iterations without a better image; 0 never does. 0: official
            code.
        max_rows: rows in one pass with a graph; 0 for all. Fewer need less memory and change nothing else.

    Raises:
        UserError: for numbers out of range.
    """

    steps: int = 50
    learning_rate: float = 5.0
    optimizer: Literal["sgd", "adam"] = "sgd"
    momentum: float = 0.9
    nesterov: bool = True
    adam_epsilon: float = 1e-2
    max_grad_norm: float = 0.1
    norm_weight: float = 0.01
    patience: int = 0
    max_rows: int = 0

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UserError(f"steps is {self.steps}: expected 1 at least, which is the plain generation")
        if self.learning_rate <= 0:
            raise UserError(f"learning_rate is {self.learning_rate}: expected a number above 0")
        if not 0 <= self.momentum < 1:
            raise UserError(f"momentum is {self.momentum}: expected a number in [0, 1)")
        require_at_least(0, self, "adam_epsilon", "max_grad_norm", "norm_weight", "patience", "max_rows")


def require_gradient(reward: WeightedSum) -> None:
    """Refuse rewards that noise cannot follow.

    Raises:
        UserError: naming them.
    """
    blind = [name for name, part in reward.parts.items() if not part.info.differentiable]
    if blind:
        raise UserError(
            f"noise follows the gradient of its rewards, and {', '.join(blind)} has none: leave it out, and compare "
            "images by it afterwards"
        )


class NoiseSearch:
    """Optimises noise.

    Example::

        search = NoiseSearch(generate, WeightedSum({"pickscore": reward}, {"pickscore": 1.0}))
        found = search(torch.randn(2, 4, 64, 64), ["a red cube", "two cats"])

    Args:
        generate: the frozen generator.
        reward: the judge.
        settings: of the optimisation.

    Raises:
        UserError: if a reward has no gradient.
    """

    def __init__(self, generate: Generate, reward: WeightedSum, settings: SearchSettings | None = None) -> None:
        require_gradient(reward)
        self.generate, self.reward, self.settings = generate, reward, settings or SearchSettings()

    def __call__(
        self,
        noise: Tensor,
        prompts: Sequence[str],
        metadata: Metadata | None = None,
        callback: Callback | None = None,
    ) -> list[Found]:
        """Search from given noise.

        Args:
            noise: (prompts, channels, ...) standard normal; kept as it is.
            prompts, metadata: one a row.
            callback: told of every iteration, part by part where ``max_rows`` splits it.

        Raises:
            UserError: if a reward is not finite.
        """
        judge = Judge(self.generate, self.reward, prompts, metadata)
        start = noise.detach().to(torch.promote_types(noise.dtype, torch.float32))
        rows = [nn.Parameter(row[None].clone()) for row in start]
        optimizer = self._optimizer(rows)
        going = list(range(len(rows)))
        for iteration in range(self.settings.steps):
            optimizer.zero_grad(set_to_none=True)
            answers = [self._iterate(judge, rows, part, iteration, callback) for part in self._parts(going)]
            if any(answers):
                break
            optimizer.step()  # rows without a gradient, whose search has ended, stay
            going = [row for row in going if not self._exhausted(judge.found[row], iteration)]
            if not going:
                break
        return judge.found

    def _iterate(
        self, judge: Judge, rows: list[nn.Parameter], part: list[int], iteration: int, callback: Callback | None
    ) -> bool:
        """Look at the images of some rows and leave clipped gradients, unless this is the last iteration."""
        last = iteration + 1 == self.settings.steps
        leaves: list[Tensor] = [rows[row] for row in part]
        with torch.set_grad_enabled(not last):
            noise = torch.cat(leaves)
            look = judge.look(noise, part, iteration)
            if not last:
                loss = noise_loss(look.totals, norm_penalty(noise), self.settings.norm_weight).sum()
                # no other leaf is asked: weights of generator and rewards are left without a gradient
                for leaf, gradient in zip(leaves, torch.autograd.grad(loss, leaves), strict=True):
                    leaf.grad = self._clipped(gradient)
        seen = judge.keep(look)
        return callback is not None and bool(callback(seen))

    def _parts(self, rows: Sequence[int]) -> list[list[int]]:
        return parts_of(rows, self.settings.max_rows)

    def _clipped(self, gradient: Tensor) -> Tensor:
        bound = self.settings.max_grad_norm
        return gradient * (bound / (gradient.norm() + 1e-6)).clamp(max=1) if bound else gradient

    def _optimizer(self, rows: list[nn.Parameter]) -> torch.optim.Optimizer:
        settings = self.settings
        if settings.optimizer == "adam":
            return torch.optim.Adam(rows, lr=settings.learning_rate, eps=settings.adam_epsilon)
        nesterov = settings.nesterov and settings.momentum > 0
        return torch.optim.SGD(rows, lr=settings.learning_rate, momentum=settings.momentum, nesterov=nesterov)

    def _exhausted(self, found: Found, iteration: int) -> bool:
        return bool(self.settings.patience) and iteration - found.iteration >= self.settings.patience
