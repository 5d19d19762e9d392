"""What a strategy sees of the data: rows in blocks, conditions, seeds.

Row order is *block* order everywhere: with ``N`` images for each of ``B`` examples the rows are
``[first image of every example, second image of every example, ...]``, so ``chunk(N)`` splits them again.
For pairs the first block holds the chosen images and the second the rejected ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """What the denoiser is conditioned on, one row for each latent; its meaning is the policy's own affair.

    Args:
        tensors: named tensors whose first dimension is the row, for example ``prompt_embeds`` of shape
            (rows, tokens, width), ``pooled_prompt_embeds`` (rows, width), ``time_ids`` (rows, 6).
    """

    tensors: Mapping[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.tensors.values())))

    def select(self, rows: Tensor | slice) -> Condition:
        """Return the given rows."""
        return Condition({name: value[rows] for name, value in self.tensors.items()})

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Condition:
        """Move to a device; floating-point tensors also change type when ``dtype`` is given."""
        moved = {
            name: value.to(device, dtype if value.is_floating_point() else None) for name, value in self.tensors.items()
        }
        return Condition(moved)

    def completed(self, other: Condition) -> Condition:
        """Return this condition with the tensors that it lacks taken from another one of as many rows.

        The empty caption has no size conditioning of its own: it takes that of the caption it stands beside.
        """
        return Condition({**other.tensors, **self.tensors})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Stack conditions row-wise.

        Raises:
            ValueError: if they hold different tensors.
        """
        if len(conditions) == 1:
            return conditions[0]
        names = conditions[0].tensors
        for condition in conditions:
            if condition.tensors.keys() != names.keys():
                raise ValueError(f"conditions hold different tensors: {sorted(names)} and {sorted(condition.tensors)}")
        return Condition({name: torch.cat([c.tensors[name] for c in conditions]) for name in names})


@dataclass(frozen=True)
class Batch:
    """A micro-batch of ``B`` examples.

    Args:
        ids: one stable name an example; caches and error messages use it.
        seeds: (B,) int64. All randomness of an example in this visit derives from its seed (see
            ``diffalign.diffusion.random``), hence neither the split into micro-batches nor the number of processes
            changes what is drawn, and a resumed run draws the same.
        prompts: the caption of each example.
        fields: per-example numbers by name, each (B, ...): labels, scores, margins, per-image weights (B, N);
            NaN where the data have gaps.
        cache_keys: one key an example when noise and timesteps are pinned to the example, so that reference
            predictions may be cached; None when every visit draws anew.
        metadata: structured description of each caption, for rewards that need it; empty where examples have none.
    """

    ids: Sequence[str]
    seeds: Tensor
    prompts: Sequence[str] = ()
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    cache_keys: Sequence[str] | None = None
    metadata: Sequence[Mapping[str, Any]] = ()

    @property
    def size(self) -> int:
        """Number of examples (pairs, lists, images or prompts), not of rows."""
        return len(self.ids)


@dataclass(frozen=True)
class ImageBatch(Batch):
    """Latents of images, or of videos, with their conditions.

    Args:
        latents: (N * B, channels, height, width), or (N * B, channels, frames, height, width); scaled for the denoiser.
            No rows, but the shape of an image's latents, where examples are captions alone.
        conditions: one for each of the N blocks, (B rows each); the *same object* where the images share a caption.
    """

    latents: Tensor = field(default_factory=lambda: torch.empty(0))
    conditions: tuple[Condition, ...] = ()

    @property
    def images_per_example(self) -> int:
        """N, the number of latents an example has."""
        return len(self.conditions)

    @property
    def condition(self) -> Condition:
        """The condition of all N * B rows, in block order."""
        return Condition.cat(self.conditions)

    def block(self, index: int) -> ImageBatch:
        """Return the batch of one image an example; block 0 of pairs holds the chosen ones."""
        latents = self.latents.chunk(self.images_per_example)[index]
        return replace(self, latents=latents, conditions=self.conditions[index : index + 1])

    def with_conditions(self, conditions: tuple[Condition, ...]) -> ImageBatch:
        """Return the same batch under other conditions (one a block)."""
        return replace(self, conditions=conditions)


@dataclass(frozen=True)
class TextBatch(Batch):
    """Token sequences: prompt followed by completion, padded on the right.

    Args:
        input_ids: (N * B, length) int64.
        attention_mask: (N * B, length), 1 on real tokens.
        completion_mask: (N * B, length), 1 on tokens of the completion, its end-of-sequence token included.
        completions_per_prompt: N.
    """

    input_ids: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    attention_mask: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    completion_mask: Tensor = field(default_factory=lambda: torch.empty(0, 0, dtype=torch.long))
    completions_per_prompt: int = 2
