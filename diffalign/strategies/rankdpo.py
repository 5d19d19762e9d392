"""RankDPO: ranked lists of images, each pair weighted by what exchanging it would cost the ranking.

Paper: Karthik et al., "Scalable Ranked Preference Optimization for Text-to-Image Generation", ICCV 2025,
arXiv 2410.18013. No official code is public; the formulas are the paper's.

N images of a caption, scored by R rewards, with one timestep, and a noise of its own for each image::

    phi_i    = share of comparisons (reward, other image) that image i wins, in [0, 1]; a tie is won by neither
    tau_i    = rank by falling phi, 1 = best; equal phi: the earlier image first
    Delta_ij = |2^phi_i - 2^phi_j| |1 / log(1 + tau_i) - 1 / log(1 + tau_j)|
    d_i      = ref_err_i - err_i                                        means over the elements of an image
    loss     = mean over captions of  sum over tau_i < tau_j of  -Delta_ij log sigmoid(beta (d_i - d_j))

Each image's error is evaluated once, N rows a caption, whatever the number of pairs. Delta carries no gradient. With
policy == reference the loss is ``log 2 * mean sum Delta``. Only orderings enter, so rewards of any scale mix; lists
without scores are taken in their order, best first.

Departures: the paper writes sums over elements and prints no beta. Errors here are means, hence beta is in the units of
Diffusion-DPO's ``0.5 * beta``; for sums over n elements it would be beta / n. The same formula serves epsilon, v and
flow; how beta depends on what the model predicts is told in ``diffusion_dpo``. Prose and listing of the paper disagree
about the roles of i and j: here i is the preferred image.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.errors import UserError
from diffalign.strategies.base import Context, Kernel, LossOutput, Spec, Strategy, Terms
from diffalign.strategies.beta import describe_beta
from diffalign.strategies.heads import accuracy, differences, preference_loss, scale_gradient
from diffalign.strategies.pair_kernel import DenoisingKernel, fresh_noise, own_noise
from diffalign.strategies.pair_loss import PairConfig, PairErrors
from diffalign.strategies.registry import register


@dataclass(frozen=True)
class RankDPOConfig(PairConfig):
    """Constants of RankDPO.

    Args:
        sft_weight: weight of the best image's own error, added to the loss. 0: paper.
        rejected_gradient_scale: factor on the gradient through the less preferred image of each pair. 1: paper.
        beta: inverse temperature on differences of mean errors. 2500: Diffusion-DPO's 5000 with the factor 0.5 of its
            formula; the paper prints none.
        shared_noise: the images of a list share their noise, which lowers the variance. False: the paper.
        normalise_weights: divide the weights of a list by their sum, so that lists of any length weigh the same. False:
            the paper.
    """

    beta: float = 2500.0
    shared_noise: bool = False
    normalise_weights: bool = False


def preference_probabilities(scores: Tensor) -> Tensor:
    """Return phi, the share of comparisons that each image wins, (B, N) in [0, 1].

    Args:
        scores: (B, N, R), higher is better under every reward.

    Raises:
        UserError: if a list has fewer than two images.
    """
    images, rewards = scores.shape[1:]
    if images < 2:
        raise UserError(f"a ranked list needs two images at least, got {images}")
    wins = scores[:, :, None, :] > scores[:, None, :, :]  # (B, N, N, R)
    dtype = torch.promote_types(scores.dtype, torch.float32)
    return wins.sum((2, 3)).to(dtype) / (rewards * (images - 1))


def ranks(phi: Tensor) -> Tensor:
    """Return the rank of each image, (B, N) int64, 1 for the greatest phi; equal ones in their order."""
    return phi.argsort(dim=1, descending=True, stable=True).argsort(dim=1) + 1


def pair_weights(phi: Tensor, normalise: bool = False) -> Tensor:
    """Return Delta, (B, N, N); ``[b, i, j]`` is zero unless image i ranks before image j.

    Args:
        phi: (B, N) preference probabilities.
        normalise: make the weights of a list sum to 1 (to 0 where all its images tie).
    """
    rank = ranks(phi)
    discount = 1 / torch.log1p(rank.to(phi.dtype))
    delta = differences(torch.exp2(phi)).abs() * differences(discount).abs()
    delta = delta * (rank[:, :, None] < rank[:, None, :])
    return delta / delta.sum((1, 2), keepdim=True).clamp_min(1e-12) if normalise else delta


@register(
    "rankdpo",
    summary="ranked lists; pairs weighted by their effect on the discounted cumulative gain",
    paper="Scalable Ranked Preference Optimization for Text-to-Image Generation (arXiv 2410.18013)",
)
class RankDPO(Strategy):
    """Learns from ranked lists."""

    spec = Spec(data="ranked_lists")
    Config = RankDPOConfig

    def kernel(self) -> Kernel:
        """One timestep a list; a noise for each image, or one for all."""
        noiser = fresh_noise if self.config.shared_noise else own_noise
        return DenoisingKernel.drawing(self.config, noiser)

    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: ImageBatch) -> LossOutput:
        """Sum over the pairs of a list, mean over lists."""
        config, size = self.config, batch.size
        err, ref_err = (value.mean(dim=1).view(-1, size).T for value in (terms.policy, terms.reference))  # (B, N)
        phi = preference_probabilities(self._scores(batch, err))
        weights = pair_weights(phi, config.normalise_weights)
        d = ref_err - err
        d_l = d[:, None, :].expand_as(weights)  # (B, N, N)
        margins = d[:, :, None] - scale_gradient(d_l, config.rejected_scale(err[:, :, None], err[:, None, :]))
        losses = (weights * preference_loss(margins, config.beta)).sum((1, 2))

        rank = ranks(phi)
        first, last = rank.argmin(dim=1, keepdim=True), rank.argmax(dim=1, keepdim=True)
        ends = PairErrors(*(e.gather(1, at)[:, 0] for e in (err, ref_err) for at in (first, last)))
        if config.sft_weight:
            losses = losses + config.sft_weight * ends.err_w
        logits, ordered = config.beta * margins.detach(), (weights > 0).to(err.dtype)
        pairs = ordered.sum((1, 2)).clamp_min(1)
        metrics = {
            "loss": losses.detach(),
            "logit": (ordered * logits).sum((1, 2)) / pairs,
            "implicit_accuracy": (ordered * accuracy(logits)).sum((1, 2)) / pairs,
            "effective_weight": (weights * torch.sigmoid(-logits)).sum((1, 2)),
        }
        return LossOutput(losses.mean(), metrics | ends.metrics())

    def describe(self, ctx: Context) -> tuple[str, ...]:
        """What beta is in the paper's terms; there is no factor 0.5 here."""
        return describe_beta(ctx, self.config.beta, factor=1.0)

    @staticmethod
    def _scores(batch: ImageBatch, like: Tensor) -> Tensor:
        """Scores (B, N, R) of the batch; of a list without scores those of its order."""
        places = torch.arange(like.shape[1], 0, -1, device=like.device, dtype=like.dtype).expand_as(like)[:, :, None]
        if "scores" not in batch.fields:
            return places
        scores = batch.fields["scores"].to(like.device)
        scores = scores if scores.dim() == 3 else scores[:, :, None]
        # gaps of a batch are NaN, which no comparison wins: the list would teach nothing
        return torch.where(scores.isnan().any(2, keepdim=True).any(1, keepdim=True), places.to(scores), scores)
