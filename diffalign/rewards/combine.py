"""Wrappers: rewards made of rewards. Each is a reward itself, so they nest."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import Metadata, Reward, RewardInfo, added_shares
from diffalign.rewards.transforms import damped_penalty, log_sigmoid_centred, pareto_ranks, rows_by_caption, win_rates


def _licences(parts: Sequence[Reward]) -> str:
    return ", ".join(sorted({part.info.licence for part in parts if part.info.licence}))


class WeightedSum(Reward):
    """``sum_k weight_k * reward_k``.

    Args:
        parts: name -> reward.
        weights: name -> factor, for each of them.
    """

    def __init__(self, parts: Mapping[str, Reward], weights: Mapping[str, float]) -> None:
        if set(parts) != set(weights):
            raise UserError(f"rewards {sorted(parts)} but weights for {sorted(weights)}")
        self.parts, self.weights = dict(parts), dict(weights)
        infos = [part.info for part in parts.values()]
        ends = [sorted(_times(weights[name], end) for end in part.info.range) for name, part in parts.items()]
        self.info = RewardInfo(
            name="+".join(f"{weights[name]:g}*{name}" for name in parts),
            unit="weighted sum",
            range=(sum(low for low, _ in ends), sum(high for _, high in ends)),
            differentiable=all(info.differentiable for info in infos),
            needs_metadata=any(info.needs_metadata for info in infos),
            licence=_licences(list(parts.values())),
        )

    def shares(self) -> Mapping[str, tuple[int, int]]:
        """Return what the parts report."""
        return added_shares(self.parts.values())

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return the sum, (batch,)."""
        return self._sum(self.score_parts(images, prompts, metadata))

    def score_pictures(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Return the sum, each part through its official preprocessing, (batch,)."""
        return self._sum(
            {name: part.score_pictures(pictures, prompts, metadata).cpu() for name, part in self.parts.items()}
        )

    def _sum(self, terms: Mapping[str, Tensor]) -> Tensor:
        return torch.stack([self.weights[name] * score for name, score in terms.items()]).sum(0)

    def score_parts(
        self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None
    ) -> dict[str, Tensor]:
        """Return every part, unweighted: name -> (batch,) on the images' device; each in its own precision."""
        # not in that of the pass around it: an image has one score, whether a gradient is wanted or not
        with torch.autocast(images.device.type, enabled=False):
            return {name: part.score(images, prompts, metadata).to(images.device) for name, part in self.parts.items()}


def _times(weight: float, end: float) -> float:
    return 0.0 if weight == 0 else weight * end


class _Wrapper(Reward):
    """One reward seen through another: what a wrapper does not change is the wrapped reward's.

    Args:
        reward: the wrapped reward.
        name: how reports call the result.
        unit, span: of the result.
        differentiable: whether the wrapper keeps gradients.
    """

    def __init__(
        self, reward: Reward, name: str, unit: str, span: tuple[float, float], differentiable: bool = True
    ) -> None:
        self.reward = reward
        inner = reward.info
        self.info = RewardInfo(
            name, unit, span, inner.differentiable and differentiable, inner.needs_metadata, inner.licence
        )

    def shares(self) -> Mapping[str, tuple[int, int]]:
        """Return what the wrapped reward reports."""
        return self.reward.shares()


class _Changed(_Wrapper):
    """A wrapper that needs nothing but the scores."""

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return changed scores, (batch,)."""
        return self.change(self.reward.score(images, prompts, metadata), prompts)

    def score_pictures(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Return changed scores of pictures of any sizes, (batch,)."""
        return self.change(self.reward.score_pictures(pictures, prompts, metadata), prompts)

    @abstractmethod
    def change(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return what scores (batch,) of images of these captions become, (batch,)."""


class Normalised(_Changed):
    """Running mean and standard deviation of all scores seen so far taken out (Welford's update, merged by batch).

    The scores of a call are counted before they are normalised; a frozen wrapper (``frozen = True``) only reads. As one
    image has another score in the next call, there is no gradient to follow. A rollout judges by the wrapped reward and
    calls :meth:`normalise` once, with the scores of all processes. Save and restore the statistics with ``state_dict``
    and ``load_state_dict``.

    Args:
        reward: the wrapped reward.
        epsilon: added to the standard deviation.
    """

    def __init__(self, reward: Reward, epsilon: float = 1e-4) -> None:
        name = f"normalised({reward.info.name})"
        super().__init__(reward, name, "standard deviations", (-math.inf, math.inf), differentiable=False)
        self.epsilon, self.frozen = epsilon, False
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def change(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return normalised scores, (batch,)."""
        return self.normalise(scores)

    def normalise(self, scores: Tensor) -> Tensor:
        """Count scores (batch,), unless frozen, and return them normalised, (batch,) without a graph."""
        scores = scores.detach()
        if not self.frozen:
            self._observe(scores.double())
        deviation = math.sqrt(self.squares / self.count) if self.count > 1 else 1.0
        return (scores - self.mean) / (deviation + self.epsilon)

    def _observe(self, scores: Tensor) -> None:
        count, mean = len(scores), float(scores.mean())
        squares = float((scores - mean).square().sum())
        total, shift = self.count + count, mean - self.mean
        self.squares += squares + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        """Return the statistics."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore the statistics."""
        self.count, self.mean, self.squares = int(state["count"]), state["mean"], state["squares"]


class LogSigmoid(_Changed):
    """``log sigmoid(reward - reference)``: the log-probability of beating a reference image (arXiv 2402.00742).

    Args:
        reward: on a preference-logit scale (PickScore, ImageReward; not a share in [0, 1]).
        reference: its level, for example the 85 % quantile of the base model's scores.
    """

    def __init__(self, reward: Reward, reference: float) -> None:
        name = f"logsigmoid({reward.info.name}-{reference:g})"
        super().__init__(reward, name, "log-probability of beating the reference level", (-math.inf, 0.0))
        self.reference = reference

    def change(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return transformed scores, (batch,)."""
        return log_sigmoid_centred(scores, self.reference)


class UncertaintyWeighted(_Wrapper):
    """Damps a reward where two looks at one image disagree (Ctrl-U's weighting, arXiv 2410.11236, for scalar rewards).

    The second look adds Gaussian noise to the pixels; U is the absolute difference of the two scores, and the result
    is ``-((top - r) exp(-a U) + w U)``.

    Args:
        reward: the wrapped reward.
        top: the score from which there is nothing more to gain.
        noise: standard deviation of the noise, of pixels in [0, 1].
        exponent_scale, weight: a and w.
        seed: of the noise, which is the same in every call.
    """

    def __init__(
        self,
        reward: Reward,
        top: float,
        noise: float = 0.02,
        exponent_scale: float = 1.0,
        weight: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__(reward, f"uncertain({reward.info.name})", f"damped {reward.info.unit}", (-math.inf, 0.0))
        self.top, self.noise, self.seed = top, noise, seed
        self.exponent_scale, self.weight = exponent_scale, weight

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return damped scores, (batch,)."""
        generator = torch.Generator().manual_seed(self.seed)
        disturbance = torch.randn(images.shape[1:], generator=generator).to(images) * self.noise
        first = self.reward.score(images, prompts, metadata)
        second = self.reward.score((images + disturbance).clamp(0, 1), prompts, metadata)
        penalty = (self.top - first).clamp(min=0)
        return -damped_penalty(penalty, (first - second).abs(), self.exponent_scale, self.weight)


class WinRate(_Changed):
    """Share of duels an image wins against the other images of its caption in the batch (Pref-GRPO's judge by score).

    Args:
        reward: compares by its scores.
        margin: scores no further apart are a tie.
    """

    def __init__(self, reward: Reward, margin: float = 0.0) -> None:
        super().__init__(reward, f"winrate({reward.info.name})", "share of duels won", (0.0, 1.0), False)
        self.margin = margin

    def change(self, scores: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return win rates, (batch,); 1/2 for an image alone with its caption."""
        scores = scores.detach()
        rates = torch.empty_like(scores)
        for rows in rows_by_caption(prompts):
            rates[rows] = win_rates(scores[rows], self.margin)
        return rates


class ParetoRank(Reward):
    """Rank of an image among those of its caption in the batch by non-dominated sorting: 0 on the front, -1 next, ...

    Args:
        parts: name -> reward; their scales do not matter.
    """

    def __init__(self, parts: Mapping[str, Reward]) -> None:
        self.parts = dict(parts)
        self.info = RewardInfo(
            name=f"pareto({','.join(parts)})",
            unit="fronts above it, negated",
            range=(-math.inf, 0.0),
            differentiable=False,
            needs_metadata=any(part.info.needs_metadata for part in parts.values()),
            licence=_licences(list(parts.values())),
        )

    def shares(self) -> Mapping[str, tuple[int, int]]:
        """Return what the parts report."""
        return added_shares(self.parts.values())

    @torch.no_grad()
    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return negated ranks, (batch,) float32."""
        scores = [part.score(images, prompts, metadata).to(images.device) for part in self.parts.values()]
        return self._ranks(torch.stack(scores, dim=-1), prompts)

    @torch.no_grad()
    def score_pictures(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Return negated ranks of pictures of any sizes, (batch,) float32."""
        scores = [part.score_pictures(pictures, prompts, metadata).cpu() for part in self.parts.values()]
        return self._ranks(torch.stack(scores, dim=-1), prompts)

    def _ranks(self, table: Tensor, prompts: Sequence[str]) -> Tensor:
        ranks = torch.empty(len(table), device=table.device)
        for rows in rows_by_caption(prompts):
            ranks[rows] = -pareto_ranks(table[rows]).float()
        return ranks
