"""Stages that sample tiny-sd for training and held-out captions, four pictures a caption, resumable by chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffalign.diffusion.random import derive_seed
from diffalign.inference.generate import generate
from diffalign.policies.loading import load_policy
from diffalign.world.grammar import PromptRecord, Split, prompts
from train_scripts.world.workspace import Workspace

LIST_SIZE = 4
CHUNK = 32
"""Captions a file."""
STEPS, GUIDANCE = 15, 5.0


@dataclass(frozen=True)
class SamplePlan:
    """What to sample.

    Args:
        name: of the cache folder.
        split: where the captions belong.
        captions: how many.
        seed: of captions and noise.
    """

    name: str
    split: Split
    captions: int
    seed: int


PROXY = SamplePlan("proxy-samples", "train", 800, 1)
TRAIN = SamplePlan("train-samples", "train", 800, 0)
TURBO = SamplePlan("turbo-samples", "train", 600, 2)
TUNE = SamplePlan("tune-samples", "tune", 64, 0)


@dataclass(frozen=True)
class SampleSet:
    """Sampled pictures.

    Args:
        records: one caption a picture: four in a row are the same.
        seeds: one a picture.
        images: (n, 3, 64, 64) in [-1, 1].
    """

    records: list[PromptRecord]
    seeds: list[int]
    images: Tensor


def draw(workspace: Workspace, plan: SamplePlan, model: str = "tiny-sd") -> None:
    """Sample a plan's pictures with a finished model."""
    policy = load_policy(workspace.out / model)
    records, seeds = _requests(workspace, plan)
    rows = CHUNK * LIST_SIZE
    for start in range(0, len(records), rows):
        path = workspace.folder(plan.name) / f"{start // rows:04d}.safetensors"
        if path.is_file():
            continue
        chunk = slice(start, start + rows)
        captions = [record.text for record in records[chunk]]
        images = generate(
            policy, captions, seeds[chunk], num_steps=STEPS, guidance_scale=GUIDANCE, batch_size=rows // 2
        )
        save_file({"images": (images * 255).round().to(torch.uint8).contiguous()}, path)
        print(f"{plan.name} {min(start + rows, len(records))}/{len(records)}", flush=True)


def load(workspace: Workspace, plan: SamplePlan) -> SampleSet:
    """Read what :func:`draw` wrote."""
    records, seeds = _requests(workspace, plan)
    files = sorted(workspace.folder(plan.name).glob("*.safetensors"))
    images = torch.cat([load_file(path)["images"] for path in files]).float() / 127.5 - 1
    return SampleSet(records[: len(images)], seeds[: len(images)], images)


def _requests(workspace: Workspace, plan: SamplePlan) -> tuple[list[PromptRecord], list[int]]:
    captions = prompts(plan.split, workspace.amount(plan.captions), plan.seed)
    seeds = [derive_seed(plan.name, plan.seed, i, k) for i in range(len(captions)) for k in range(LIST_SIZE)]
    return [record for record in captions for _ in range(LIST_SIZE)], seeds
