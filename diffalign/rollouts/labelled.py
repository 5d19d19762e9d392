"""Images that people judge: sampled with seeds on record, so that their trajectories can be reproduced.

An image depends on its seed, the model and the sampler alone. So nothing but the seed of its caption's group, and what
tells whether model and sampler are the same, is kept beside the images; once they have been labelled, the start of
training samples the same trajectories again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.data.pairing import ROLLOUT
from diffalign.diffusion.random import derive_seed
from diffalign.errors import UserError
from diffalign.policies.base import Policy
from diffalign.rollouts.provenance import Provenance
from diffalign.rollouts.rollout import RolloutConfig
from diffalign.rollouts.trajectory import Storage, image_seeds, roll_out

FILE = "samples.jsonl"
_SETTINGS = (
    "images_per_prompt", "rollout_steps", "rollout_guidance_scale", "eta", "noise_level", "noise_schedule",
    "same_start", "latents_dtype",
)  # fmt: skip


def sampling_settings(config: RolloutConfig) -> dict[str, Any]:
    """Return all options that the images of a rollout depend on."""
    return {name: getattr(config, name) for name in _SETTINGS}


def write_samples(
    policy: Policy,
    prompts: Sequence[str],
    config: RolloutConfig,
    seed: int,
    folder: Path,
    size: tuple[int, int] | None = None,
    autocast: torch.dtype | None = None,
) -> Path:
    """Sample ``images_per_prompt`` images of each caption and write them with a table that the labelling app reads.

    Args:
        policy: samples, with whatever adapter is active.
        prompts: captions.
        config: how.
        seed: other seeds give other images.
        folder: where; made if missing.
        size: (height, width) of the images in pixels; the model's own by default.
        autocast: type of products in mixed precision, as in the run that will train; None without.

    Returns:
        the table, ``samples.jsonl``.

    Raises:
        UserError: if the folder holds such a table already.
    """
    from PIL import Image

    table = folder / FILE
    if table.exists():
        raise UserError(f"{table} exists: labels may belong to it; choose another folder")
    folder.mkdir(parents=True, exist_ok=True)
    size, rows = size or policy.default_resolution, []
    provenance = Provenance.of(policy, policy.adapters.active, size, autocast).record()
    for index, prompt in enumerate(prompts):
        group = derive_seed(seed, "labelled", index)
        with torch.autocast(policy.device.type, dtype=autocast, enabled=autocast is not None):
            images = _sampled(policy, prompt, config, group, size)
        names = [f"{index:05d}-{image}.png" for image in range(len(images))]
        for name, picture in zip(names, images, strict=True):
            Image.fromarray(picture.permute(1, 2, 0).numpy()).save(folder / name)
        origin = {"seed": group, **sampling_settings(config), **provenance}
        rows.append({"id": str(index), "prompt": prompt, "images": names, "metadata": {ROLLOUT: origin}})
    draft = table.with_suffix(".tmp")
    draft.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return draft.replace(table)


def _sampled(policy: Policy, prompt: str, config: RolloutConfig, group: int, size: tuple[int, int]) -> Tensor:
    """Return the images of a caption, (images, 3, height, width) bytes on the CPU."""
    count = config.images_per_prompt
    # in the type of the run's conditions (data.encode)
    condition = policy.encode_prompts([prompt] * count).to(policy.device, policy.dtype)
    trajectories = roll_out(
        policy,
        config.sampler(policy.process_for(*size)),
        policy.with_size(condition, {"original_size": size}),
        image_seeds(torch.tensor([group]), count),
        policy.latent_shape(*size),
        guidance_scale=config.rollout_guidance_scale,
        start_seeds=torch.tensor([group] * count) if config.same_start else None,
        storage=Storage(config.kept_dtype),
    )
    with policy.inference():
        return (policy.decode(trajectories.final) * 255).round().to(torch.uint8).cpu()


def as_sampled(batch: ImageBatch, config: RolloutConfig) -> tuple[ImageBatch, Tensor]:
    """Return a batch with the seeds that its images were sampled with, and their labels, (images, B) float32.

    Args:
        batch: captions whose metadata say how images were sampled ("rollout") and what people said ("scores").
        config: must sample alike.

    Raises:
        UserError: if a caption has no labelled images, or they were sampled otherwise.
    """
    read = [
        read_labels(name, row, config) for name, row in zip(batch.ids, batch.metadata or [{}] * batch.size, strict=True)
    ]
    seeds, scores = [seed for seed, _ in read], [labels for _, labels in read]
    return replace(batch, seeds=torch.tensor(seeds, dtype=torch.long)), torch.tensor(scores).T


def read_labels(name: str, metadata: Mapping[str, Any], config: RolloutConfig) -> tuple[int, list[float]]:
    """Return the seed that a caption's images were sampled with, and their labels.

    Raises:
        UserError: naming the row, if it has no labelled images, or they were sampled otherwise.
    """
    origin, labels = metadata.get(ROLLOUT), metadata.get("scores")
    if origin is None or labels is None:
        raise UserError(
            f"row {name!r} holds no labels of images that were sampled for labelling: give --prompts the file that "
            "`diffalign label export` wrote"
        )
    _require_same(origin, config, name)
    if len(labels) != config.images_per_prompt:
        raise UserError(
            f"row {name!r} has labels of {len(labels)} of {config.images_per_prompt} images: those of a caption "
            "must be judged as one task"
        )
    return int(origin["seed"]), [float(value) for value in labels]


def _require_same(origin: Mapping[str, Any], config: RolloutConfig, name: str) -> None:
    for option, value in sampling_settings(config).items():
        if origin.get(option) != value:
            raise UserError(
                f"the images of row {name!r} were sampled with {option} {origin.get(option)!r}, this run has "
                f"{value!r}: set --{option} to what they were sampled with"
            )
