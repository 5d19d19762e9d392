"""What imitation does: plain fine-tuning on a model's own samples, as latents and as pictures, and on true pictures.

    python benchmarks/imitation.py [--model tiny-sd] [--images 1536] [--steps 200] [--captions 400] [--out FILE]

Samples of the start are nothing new to it, but hold its mistakes. Trained on as the latents that they were drawn as,
they show what imitation of own samples does; trained on as pictures, encoded again, they show what the autoencoder's
round trip adds. Both runs see the same samples, noise and timesteps. The third run sees pictures that show what their
captions say (``--dataset_name rendered``). Printed for each: win rate over the start on captions of the tune split,
with the same initial noise, and the changes of the scores.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

import torch
from jsonargparse import auto_cli
from PIL import Image
from torch import Tensor

import diffalign
from diffalign.evaluation.winrate import bootstrap_mean
from diffalign.inference.generate import decode_images, generate_latents
from diffalign.policies.codec import LatentCodec
from diffalign.world.evaluation import world_evaluator
from diffalign.world.grammar import prompts

Encode = Callable[..., Tensor]


def as_they_were(images: Tensor, latents: Tensor) -> Encode:
    """Return an encoder that knows the latents (n, channels, ...) of images (n, 3, height, width) in [0, 1]."""
    known = {_bytes(image): row for image, row in zip(images, latents, strict=True)}

    def encode(codec: LatentCodec, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return torch.stack([known[_bytes(row / 2 + 0.5)] for row in pixels])

    return encode


def _bytes(image: Tensor) -> bytes:
    return _levels(image).numpy().tobytes()


def _levels(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8)


def main(
    model: str = "tiny-sd",
    images: int = 1536,
    steps: int = 200,
    captions: int = 400,
    guidance_scale: float = 3.0,
    out: str = "",
) -> None:
    """Sample, train three times, compare; see the module's text.

    Args:
        model: name or folder.
        images: how many to train on, samples of the start or true pictures.
        steps: optimizer steps of each run.
        captions: of the tune split, for the comparison.
        guidance_scale: of all samples.
        out: write a JSON file here.
    """
    start = diffalign.load_policy(model)
    texts = [record.text for record in prompts("train", images, 1)]
    latents = generate_latents(start, texts, list(range(images)), num_steps=15, guidance_scale=guidance_scale)
    pictures = decode_images(start, latents)
    rows = [
        {"prompt": text, "image": Image.fromarray(_levels(picture).permute(1, 2, 0).numpy())}
        for text, picture in zip(texts, pictures, strict=True)
    ]
    evaluator = world_evaluator("tune", captions)
    before = evaluator.evaluate(start, 15, guidance_scale)
    arms: dict[str, tuple[Any, AbstractContextManager[Any]]] = {
        "own samples as latents": (rows, mock.patch.object(LatentCodec, "encode", as_they_were(pictures, latents))),
        "own samples as pictures": (rows, nullcontext()),
        "true pictures": ("rendered", nullcontext()),
    }
    found = {}
    for name, (data, encoding) in arms.items():
        options = {"max_train_samples": images, "evaluation_prompts": 0, "num_validation_images": 0}
        with TemporaryDirectory() as folder, encoding:
            run = diffalign.train(data, method="sft", output_dir=folder, max_train_steps=steps, **options)
            after = evaluator.evaluate(diffalign.load_policy(str(run.folder)), 15, guidance_scale)
        changes = {
            key: bootstrap_mean((after.scores[key] - before.scores[key])[None].double()) for key in before.scores
        }
        found[name] = {"win rate": str(evaluator.compare(before, after)), **{k: str(v) for k, v in changes.items()}}
        print(name, found[name])
    if out:
        Path(out).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    auto_cli(main)
