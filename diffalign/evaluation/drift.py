"""How far a model and its samples have moved from the start, and whether the samples are about to collapse.

A reward that is being gamed keeps rising while samples leave the start ever further, lose their variety or turn gaudy.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from diffalign.data.team import Alone, Team
from diffalign.diffusion.random import randn_rows
from diffalign.evaluation.sharing import latents_together
from diffalign.inference.generate import decode_images
from diffalign.policies.base import Policy
from diffalign.policies.saving import write_safetensors

_NOISED = (0.25, 0.5, 0.75)
"""Shares of the training timesteps at which predictions are compared."""


@dataclass(frozen=True)
class Probe:
    """Captions with a seed each, the same throughout a run.

    Args:
        prompts: the captions; the seeds are their places.
        num_steps, guidance_scale: how they are sampled.
        resolution: (height, width) in pixels; None for the model's own.
    """

    prompts: tuple[str, ...]
    num_steps: int
    guidance_scale: float
    resolution: tuple[int, int] | None = None

    def latents(self, policy: Policy, team: Team) -> Tensor:
        """Sample every caption with the weights that the policy has now, all processes together."""
        return latents_together(
            policy,
            self.prompts,
            range(len(self.prompts)),
            team,
            num_steps=self.num_steps,
            guidance_scale=self.guidance_scale,
            resolution=self.resolution,
        )

    def sample(self, policy: Policy) -> Samples:
        """Sample every caption with the weights that the policy has now."""
        return Samples.of(policy, self.latents(policy, Alone()))

    def predict(self, policy: Policy, latents: Tensor) -> Tensor:
        """Return what the policy predicts for given latents (n, channels, ...), noised to a few levels, (3 n, ...)."""
        process, rows = policy.process, len(_NOISED) * len(latents)
        indices = torch.tensor([int(share * process.num_train_timesteps) for share in _NOISED])
        timesteps = process.timestep_at(indices.repeat_interleave(len(latents))).to(policy.device)
        clean = latents.to(policy.device).repeat(len(_NOISED), *[1] * (latents.dim() - 1))
        noise = randn_rows(torch.arange(rows), clean.shape[1:], "probe", policy.device)
        sizes = {"original_size": self.resolution or policy.default_resolution}
        condition = policy.with_size(policy.encode_prompts(self.prompts * len(_NOISED)), sizes)
        with policy.inference():
            return policy.predict(process.add_noise(clean, noise, timesteps), timesteps, condition).float().cpu()


@dataclass(frozen=True)
class Samples:
    """Images of a probe.

    Args:
        latents: (n, channels, ...) of the images.
        images: (n, 3, height, width) in [0, 1], rounded to the 256 levels of an image file.
    """

    latents: Tensor
    images: Tensor

    @staticmethod
    def of(policy: Policy, latents: Tensor) -> Samples:
        """Decode latents."""
        return Samples(latents.float().cpu(), decode_images(policy, latents))


@dataclass(frozen=True)
class Start:
    """What a model sampled and predicted before it was trained.

    Args:
        probe: the captions.
        samples: of the start.
        predictions: of the start, for its own samples (see :meth:`Probe.predict`).
    """

    probe: Probe
    samples: Samples
    predictions: Tensor

    @staticmethod
    def of(policy: Policy, probe: Probe, samples: Samples) -> Start:
        """Take the policy's present weights as the start; ``samples`` are theirs."""
        return Start(probe, samples, probe.predict(policy, samples.latents))

    def save(self, path: Path) -> None:
        """Write to a safetensors file.

        Raises:
            UserError: if it cannot be written.
        """
        pixels = (self.samples.images * 255).round().to(torch.uint8)
        tensors = {"latents": self.samples.latents, "images": pixels, "predictions": self.predictions}
        contiguous = {name: value.contiguous() for name, value in tensors.items()}
        write_safetensors(path, contiguous, {"probe": _text(self.probe)})

    @staticmethod
    def load(path: Path, probe: Probe) -> Start | None:
        """Read what :meth:`save` wrote; None if there is no file, or it holds samples of other captions or settings."""
        if not path.is_file():
            return None
        with safe_open(path, "pt") as file:
            if file.metadata().get("probe") != _text(probe):
                return None
            latents, images, predictions = (file.get_tensor(name) for name in ("latents", "images", "predictions"))
        return Start(probe, Samples(latents, images.float() / 255), predictions)

    def drift(self, policy: Policy, now: Samples) -> dict[str, float]:
        """Return distances of the present weights, and of their samples, to the start.

        Returns:
            ``drift/latent`` and ``drift/pixel``, root mean square distances of a sample averaged over samples;
            ``drift/prediction``, the mean squared difference of predictions for the same noisy latents.
        """
        predictions = self.probe.predict(policy, self.samples.latents)
        return {
            "drift/latent": _distance(self.samples.latents, now.latents).mean().item(),
            "drift/pixel": _distance(self.samples.images, now.images).mean().item(),
            "drift/prediction": (predictions - self.predictions).square().mean().item(),
        }


def appearance(images: Tensor) -> dict[str, float]:
    """Return what collapse shows in first.

    Args:
        images: (n, 3, height, width) in [0, 1].

    Returns:
        ``samples/colourfulness`` (Hasler and Suesstrunk 2003, on the scale of 256 levels: 0 grey, above 80 gaudy), and
        for two images or more ``samples/diversity``, the root mean square distance of two of them, averaged.
    """
    figures = {"samples/colourfulness": _colourfulness(images).mean().item()}
    if len(images) > 1:
        first, second = torch.triu_indices(len(images), len(images), offset=1)
        figures["samples/diversity"] = _distance(images[first], images[second]).mean().item()
    return figures


def _text(probe: Probe) -> str:
    settings: Sequence[Any] = (list(probe.prompts), probe.num_steps, probe.guidance_scale, probe.resolution)
    return json.dumps(settings)


def _distance(first: Tensor, second: Tensor) -> Tensor:
    """Root mean square differences, (n,)."""
    return (first.float() - second.float()).flatten(1).square().mean(dim=1).sqrt()


def _colourfulness(images: Tensor) -> Tensor:
    red, green, blue = (255 * images.float()).flatten(2).unbind(dim=1)
    axes = torch.stack([red - green, 0.5 * (red + green) - blue])  # (2, n, pixels)
    spread = axes.var(dim=2, unbiased=False).sum(dim=0).sqrt()
    return spread + 0.3 * axes.mean(dim=2).square().sum(dim=0).sqrt()
