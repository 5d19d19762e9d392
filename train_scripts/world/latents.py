"""Stage "latents": training captions and the latents of their pictures, so that denoisers never wait for either."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTokenizer

from train_scripts.world.pictures import rendered
from train_scripts.world.vae import encode
from train_scripts.world.workspace import Workspace

COUNT = 80_128
CHUNK = 64


@dataclass(frozen=True)
class LatentSet:
    """Encoded training data of the denoisers.

    Args:
        latents: (n, 4, 16, 16), scaled to unit deviation, float16.
        captions: n captions.
    """

    latents: Tensor
    captions: list[str]

    def token_ids(self, tokenizer: CLIPTokenizer) -> Tensor:
        """Return the captions' tokens, padded, (n, length)."""
        return tokenizer(self.captions, padding="max_length", truncation=True, return_tensors="pt").input_ids


def make(workspace: Workspace) -> None:
    """Render and encode the training set."""
    vae = AutoencoderKL.from_pretrained(workspace.folder("vae")).to(memory_format=torch.channels_last)
    latents, captions = [], []
    for chunk in range(workspace.amount(COUNT, CHUNK) // CHUNK):
        records, images = rendered(CHUNK, random.Random(f"latents/{chunk}"))
        latents.append((encode(vae, images) * vae.config.scaling_factor).half())
        captions += [record.text for record in records]
    folder = workspace.folder("latents")
    save_file({"latents": torch.cat(latents).contiguous()}, folder / "latents.safetensors")
    (folder / "captions.json").write_text(json.dumps(captions), encoding="utf-8")


def load(workspace: Workspace) -> LatentSet:
    """Read what :func:`make` wrote."""
    folder = workspace.folder("latents")
    captions = json.loads((folder / "captions.json").read_text(encoding="utf-8"))
    return LatentSet(load_file(folder / "latents.safetensors")["latents"], captions)


def empty_caption(tokenizer: CLIPTokenizer) -> Tensor:
    """Return the padded tokens of the empty caption, (length,)."""
    return tokenizer("", padding="max_length", truncation=True, return_tensors="pt").input_ids[0]
