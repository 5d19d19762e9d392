"""PAL (Chen et al., arXiv 2406.08469; official code RamyaLab/pluralistic-alignment): a scorer for people who disagree.

Images and people lie in one space, and the nearer image wins. Everyone's ideal point is a mixture of K points that all
share, so that a new person costs K numbers:

    items        f(x), x the frozen embedding of an image
    model A      a = sum_k w_k f(P_k)  |  f(sum_k w_k P_k)  |  sum_k w_k P_k        prototypes P_k, whatever the caption
    model B      a = sum_k w_k g_k(c)                                              c the frozen embedding of the caption
    score        -||f(x) - a||   or   min(exp(logit_scale), 100) cos(f(x), a)

Shapes: items (batch, dimensions), mixtures w (batch, K), ideal points a (batch, width), scores (batch,).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffalign.errors import UserError, unknown

Place = Literal["f(P)w", "f(Pw)", "Pw", "prompt"]
Distance = Literal["dist", "angle"]
MAX_SCALE = 100.0
_EPSILON = 1e-12
"""Under the root of distances, whose gradient at zero has no direction."""


@dataclass(frozen=True)
class PalConfig:
    """Shape of a head. Defaults are those of the official text models.

    Args:
        dimensions: of the frozen embeddings.
        width: of the common space.
        prototypes: K, points that people's ideals are mixed from.
        place: where an ideal point comes from: model A's three rules, or "prompt" for model B.
        distance: "dist", or "angle" for the scaled cosine.
        layers: of the projectors; 1 is a linear map.
        temperature: of the softmax over a person's K numbers.
    """

    dimensions: int
    width: int = 512
    prototypes: int = 2
    place: Place = "f(P)w"
    distance: Distance = "dist"
    layers: int = 2
    temperature: float = 1.0

    def __post_init__(self) -> None:
        for what, value, known in (("place", self.place, Place), ("distance", self.distance, Distance)):
            if value not in get_args(known):
                raise unknown(f"{what} of PAL", value, get_args(known))
        if min(self.dimensions, self.width, self.prototypes, self.layers) < 1:
            raise UserError("PAL needs dimensions, width, prototypes and layers of at least 1")


def projector(config: PalConfig) -> nn.Sequential:
    """Make a map from embeddings to the common space: linear layers with GELU between them."""
    modules: list[nn.Module] = [nn.Linear(config.dimensions, config.width)]
    for _ in range(config.layers - 1):
        modules += [nn.GELU(), nn.Linear(config.width, config.width)]
    return nn.Sequential(*modules)


class PalHead(nn.Module):
    """The trained part.

    Args:
        config: its shape.
        users: names of the people, in any order; each gets K numbers.
        seed: of the initial prototypes (directions of length 1) and numbers (standard normal), as officially.
    """

    def __init__(self, config: PalConfig, users: Iterable[str] = (), seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.users: dict[str, int] = {}
        generator = torch.Generator().manual_seed(seed)
        self._generator = generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.items = projector(config)
            by_prompt = config.place == "prompt"
            self.captions = nn.ModuleList(projector(config) for _ in range(config.prototypes if by_prompt else 0))
        width = config.width if config.place == "Pw" else config.dimensions
        points = torch.randn(0 if by_prompt else config.prototypes, width, generator=generator)
        self.prototypes = nn.Parameter(F.normalize(points, dim=-1))
        self.logits = nn.Parameter(torch.zeros(0, config.prototypes))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.add_users(users)

    def add_users(self, names: Iterable[str]) -> None:
        """Give new people numbers of their own; optimizers made before do not know them.

        Raises:
            UserError: if a name is known already.
        """
        new = list(dict.fromkeys(names))
        if twice := [name for name in new if name in self.users]:
            raise UserError(f"PAL knows the user {twice[0]!r} already")
        rows = torch.randn(len(new), self.config.prototypes, generator=self._generator).to(self.logits)
        self.logits = nn.Parameter(torch.cat([self.logits.detach(), rows]))
        self.users.update({name: len(self.users) + index for index, name in enumerate(new)})

    def mixtures(self, users: Sequence[str]) -> Tensor:
        """Return everyone's mixture, (batch, K), rows of sum 1.

        Raises:
            UserError: for a name that is not known.
        """
        if odd := [name for name in users if name not in self.users]:
            raise unknown("user of PAL", odd[0], self.users)
        rows = torch.tensor([self.users[name] for name in users], device=self.logits.device)
        return (self.logits[rows] / self.config.temperature).softmax(-1)

    def ideal_points(self, mixtures: Tensor, captions: Tensor | None = None) -> Tensor:
        """Return ideal points (batch, width) of mixtures (batch, K).

        Args:
            captions: embeddings (batch, dimensions); needed where ideals depend on the caption.

        Raises:
            UserError: if they are needed and not given.
        """
        place = self.config.place
        if place == "prompt":
            if captions is None:
                raise UserError("these ideal points depend on the caption: give the captions' embeddings")
            points = torch.stack([project(captions) for project in self.captions], dim=1)
            return torch.einsum("bk,bkd->bd", mixtures, points)
        if place == "f(P)w":
            return mixtures @ self.items(self.prototypes)
        mixed = mixtures @ self.prototypes
        return mixed if place == "Pw" else self.items(mixed)

    def forward(self, images: Tensor, points: Tensor) -> Tensor:
        """Score images (batch, dimensions) for ideal points (batch, width), (batch,); higher is nearer."""
        items = self.items(images)
        if self.config.distance == "dist":
            return -((items - points).square().sum(-1) + _EPSILON).sqrt()
        return self.logit_scale.exp().clamp(max=MAX_SCALE) * F.cosine_similarity(items, points, dim=-1)


def out_of_bounds(points: Tensor, bound: float) -> Tensor:
    """Sum over ideal points (batch, width) of their length beyond ``bound``, ().

    An optional term; the official code computes it and leaves it out of the loss, where it lowered the accuracy.
    """
    return (points.norm(dim=-1) - bound).clamp(min=0).sum()
