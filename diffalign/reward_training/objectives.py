"""What is trained and how it is judged: one class an objective, over a CLIP model."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.data.image_source import ImageSource
from diffalign.errors import UserError
from diffalign.reward_training.config import RewardTrainingConfig
from diffalign.reward_training.pairs import EVERYONE, ScorerPair
from diffalign.rewards.clip_model import projected, unit
from diffalign.rewards.heteroscedastic import VARIANCE_FILE, VarianceHead
from diffalign.rewards.objective import (
    caption_weights,
    heteroscedastic_cross_entropy,
    in_batch_cross_entropy,
    margin_loss,
    pair_logits,
    preference_cross_entropy,
)
from diffalign.rewards.pal import MAX_SCALE, PalConfig, PalHead
from diffalign.rewards.pal_reward import save_pal
from diffalign.rewards.pickscore import PickScore
from diffalign.strategies.base import ParameterGroup

_NEW_LAYER = 100.0
"""Rate of a layer that starts from nothing beside towers that are fine-tuned."""
_POINTS, _SCALE = 50.0, 1000.0
"""Rates of PAL's points (5e-3) and logit scale (0.1) over that of its projectors (1e-4), in its code."""


class ScorerObjective(ABC):
    """A scorer under training.

    Args:
        scorer: what it starts from.
        config: the run's options.

    Attributes:
        trained: every trained parameter is in here.
    """

    trained: nn.Module

    def __init__(self, scorer: PickScore, config: RewardTrainingConfig) -> None:
        self.scorer, self.config = scorer, config
        self.model: Any = scorer.towers.model

    @abstractmethod
    def scores(self, pairs: Sequence[ScorerPair]) -> Tensor:
        """Score both images of each pair, (batch, 2); higher is better."""

    @abstractmethod
    def loss(self, pairs: Sequence[ScorerPair]) -> tuple[Tensor, Tensor]:
        """Return the loss, (), and the scores, (batch, 2)."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what a reward loads."""

    def groups(self) -> list[ParameterGroup]:
        """Return all trained parameters with the factors on their learning rate."""
        return [ParameterGroup(list(self.trained.parameters()))]

    def pixels(self, images: Sequence[ImageSource]) -> Tensor:
        """Prepare images through the official pipeline, (batch, 3, size, size)."""
        prepared = self.scorer.preprocess.exact([image.decode() for image in images])
        return prepared.to(self.config.device)

    def labels(self, pairs: Sequence[ScorerPair]) -> Tensor:
        """Return labels, (batch,): 1 for the first, 0 for the second, 1/2 for a tie."""
        return torch.tensor([pair.label for pair in pairs], device=self.config.device)

    def weights(self, pairs: Sequence[ScorerPair]) -> Tensor:
        """Return weights, (batch,), of sum 1: captions count alike."""
        return caption_weights(torch.tensor([float(pair.siblings) for pair in pairs], device=self.config.device))


class PairObjective(ScorerObjective):
    """PickScore's: all of the CLIP model is trained; with negatives from the batch by option."""

    def __init__(self, scorer: PickScore, config: RewardTrainingConfig) -> None:
        super().__init__(scorer, config)
        self.trained = self.model.requires_grad_(True).train()

    def embeddings(self, pairs: Sequence[ScorerPair]) -> tuple[Tensor, Tensor, Tensor]:
        """Return unit embeddings of captions, first and second images, (batch, dimensions) each."""
        tokens = self.scorer.towers.tokenizer(
            [pair.prompt for pair in pairs], padding="max_length", truncation=True, return_tensors="pt"
        ).to(self.config.device)
        text = self.model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        pixels = self.pixels([*(pair.first for pair in pairs), *(pair.second for pair in pairs)])
        first, second = unit(projected(self.model.get_image_features(pixel_values=pixels))).chunk(2)
        return unit(projected(text)), first, second

    @property
    def logit_scale(self) -> Tensor:
        """Factor of cosines, (); at most 100, as CLIP's is kept."""
        scale: Tensor = self.model.logit_scale.exp()
        return scale.clamp(max=MAX_SCALE)

    def scores(self, pairs: Sequence[ScorerPair]) -> Tensor:
        """Return preference logits, (batch, 2)."""
        return pair_logits(*self.embeddings(pairs), self.logit_scale)

    def loss(self, pairs: Sequence[ScorerPair]) -> tuple[Tensor, Tensor]:
        """Return PickScore's cross entropy and the logits."""
        text, first, second = self.embeddings(pairs)
        labels, weights = self.labels(pairs), self.weights(pairs)
        logits = pair_logits(text, first, second, self.logit_scale)
        if self.config.objective == "in_batch":
            return in_batch_cross_entropy(text, first, second, labels, self.logit_scale, weights), logits
        return preference_cross_entropy(logits, labels, weights), logits

    def save(self, folder: Path) -> None:
        """Write a folder that loads as PickScore does."""
        self.model.save_pretrained(folder)
        self.scorer.towers.tokenizer.save_pretrained(folder)
        preprocess = self.scorer.preprocess
        settings = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": getattr(preprocess, "edge", preprocess.size)},
            "crop_size": {"height": preprocess.size, "width": preprocess.size},
            "image_mean": list(preprocess.mean),
            "image_std": list(preprocess.std),
        }
        (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


class HeteroscedasticObjective(PairObjective):
    """The same, with a head that learns how sure the scorer is."""

    def __init__(self, scorer: PickScore, config: RewardTrainingConfig) -> None:
        super().__init__(scorer, config)
        self.head = VarianceHead(self.model.config.projection_dim).to(config.device)
        self.trained = nn.ModuleDict({"model": self.model, "variance": self.head})

    def groups(self) -> list[ParameterGroup]:
        """Return the towers, and the head, which starts from nothing."""
        return [
            ParameterGroup(list(self.model.parameters())),
            ParameterGroup(list(self.head.parameters()), lr_scale=_NEW_LAYER),
        ]

    def loss(self, pairs: Sequence[ScorerPair]) -> tuple[Tensor, Tensor]:
        """Return the cross entropy of the margin's probit and the means."""
        text, first, second = self.embeddings(pairs)
        means = pair_logits(text, first, second, self.logit_scale)
        log_variances = torch.stack([self.head(image, text) for image in (first, second)], dim=-1)
        return heteroscedastic_cross_entropy(means, log_variances, self.labels(pairs), self.weights(pairs)), means

    def save(self, folder: Path) -> None:
        """Write the CLIP model and the head beside it."""
        super().save(folder)
        state = {name: value.detach().cpu().contiguous() for name, value in self.head.state_dict().items()}
        save_file(state, folder / VARIANCE_FILE)


class PalObjective(ScorerObjective):
    """Ideal points: the CLIP model stays as it is, and every image is embedded once.

    Args:
        scorer, config: as for all.
        pairs: all pairs: their people get numbers, their images are embedded.

    Raises:
        UserError: if the pairs name nobody.
    """

    def __init__(self, scorer: PickScore, config: RewardTrainingConfig, pairs: Sequence[ScorerPair]) -> None:
        super().__init__(scorer, config)
        users = sorted({pair.user for pair in pairs})
        if users == [EVERYONE]:
            raise UserError(
                f"ideal points are those of people, but no row of {config.dataset_name} has a {config.user_column!r}: "
                "name the column that tells people apart with --user_column"
            )
        shape = PalConfig(
            dimensions=self.model.config.projection_dim,
            width=config.width,
            prototypes=config.prototypes,
            place=config.place,
            distance=config.distance,
        )
        self.trained = self.head = PalHead(shape, users, config.seed).to(config.device)
        self._known = self._embed_all(pairs)

    def groups(self) -> list[ParameterGroup]:
        """Return projectors, points and people's numbers, and the scale, at the rates of the official code."""
        maps = [*self.head.items.parameters(), *self.head.captions.parameters()]
        return [
            ParameterGroup(maps),
            ParameterGroup([self.head.prototypes, self.head.logits], lr_scale=_POINTS),
            ParameterGroup([self.head.logit_scale], lr_scale=_SCALE),
        ]

    def scores(self, pairs: Sequence[ScorerPair]) -> Tensor:
        """Return everyone's scores of the two images, (batch, 2)."""
        captions = None
        if self.head.config.place == "prompt":
            captions = self.scorer.towers.text([pair.prompt for pair in pairs])
        points = self.head.ideal_points(self.head.mixtures([pair.user for pair in pairs]), captions)
        sides = [[pair.first for pair in pairs], [pair.second for pair in pairs]]
        return torch.stack([self.head(self._embedded(images), points) for images in sides], dim=-1)

    def loss(self, pairs: Sequence[ScorerPair]) -> tuple[Tensor, Tensor]:
        """Return the loss of margins, or for angles the cross entropy, and the scores."""
        scores, labels, weights = self.scores(pairs), self.labels(pairs), self.weights(pairs)
        if self.head.config.distance == "angle":
            return preference_cross_entropy(scores, labels, weights), scores
        return margin_loss(scores[:, 0] - scores[:, 1], labels, self.config.margin_loss, weights), scores

    def save(self, folder: Path) -> None:
        """Write the head and the name of its CLIP model."""
        save_pal(folder, self.head, self.config.model)

    def _embedded(self, images: Sequence[ImageSource]) -> Tensor:
        return torch.stack([self._known[image.name] for image in images])

    @torch.no_grad()
    def _embed_all(self, pairs: Sequence[ScorerPair]) -> dict[str, Tensor]:
        """Embed every image once, always in the same batches: their size shows in the last bit of an embedding."""
        images = list({image.name: image for pair in pairs for image in (pair.first, pair.second)}.values())
        known: dict[str, Tensor] = {}
        size = self.config.budget.batch_size
        for start in range(0, len(images), size):
            batch = images[start : start + size]
            found = self.scorer.towers.image(self.pixels(batch))
            known.update(zip((image.name for image in batch), found, strict=True))
        return known


def build_objective(scorer: PickScore, config: RewardTrainingConfig, pairs: Sequence[ScorerPair]) -> ScorerObjective:
    """Make what the options name, for the pairs to train on and those held out."""
    if config.objective == "pal":
        return PalObjective(scorer, config, pairs)
    if config.objective == "heteroscedastic":
        return HeteroscedasticObjective(scorer, config)
    return PairObjective(scorer, config)
