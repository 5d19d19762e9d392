"""Images of an evaluation: drawn in blocks, by any number of processes, resumable.

A block is ``batch_size`` consecutive images and is drawn whole, by one process. So neither an interruption nor the
number of processes changes what is in a batch, and a finished folder is the same to the bit (on a CPU) however it came
about. Blocks are dealt by index: no image is drawn twice, none is padded.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from PIL import Image
from torch import Tensor

from diffalign.bundled import is_bundled
from diffalign.errors import UserError
from diffalign.evaluation.layouts import Shot, companions, plan
from diffalign.evaluation.manifest import ENVIRONMENT, begin_or_continue
from diffalign.evaluation.presets import SamplingPreset, choose_preset
from diffalign.evaluation.prompt_sets import PromptSet, load_prompts
from diffalign.inference.generate import generate
from diffalign.policies.base import Policy
from diffalign.policies.loading import Source, load_adapter, load_policy, resolve
from diffalign.policies.saving import lora_path
from diffalign.records import sha256_of, write_jsonl, write_text
from diffalign.training.processes import Processes
from diffalign.training.runfolder import environment

TABLE = "images.jsonl"
_ADAPTER = "evaluated"


Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class Request:
    """What is to be drawn.

    Args:
        model: bundled name, folder, hub name, or the folder of a training run.
        prompts: see ``load_prompts``.
        output: folder for the images; one that exists is continued if its settings are the same.
        adapter: folder or file of a LoRA on the model.
        preset: named sampling settings; those of the model by default.
        changes: fields of the preset that are others; None leaves one as it is.
        layout: names of the files.
        limit: use only the first captions of the set.
        dtype: how the networks run.
        batch_size: images drawn at once.
        device: where the networks run; by default each process has its own.
    """

    model: str
    prompts: str
    output: Path
    adapter: str | None = None
    preset: str | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    layout: str = "flat"
    limit: int | None = None
    dtype: Precision = "float32"
    batch_size: int = 8
    device: str | None = None


@dataclass(frozen=True)
class Drawn:
    """What was drawn.

    Args:
        images: in all.
        now: by this call.
        preset: name of the settings.
    """

    images: int
    now: int
    preset: str


class Workers(Protocol):
    """The processes that share the work."""

    @property
    def rank(self) -> int:
        """Place of this process."""

    @property
    def world_size(self) -> int:
        """Number of processes."""


def draw_request(request: Request, processes: Processes) -> Drawn:
    """Load a model and draw everything that is missing, in all processes together.

    Raises:
        UserError: for a model, captions or settings that cannot be had, or a folder that was begun with others.
    """
    prompts = load_prompts(request.prompts).first(request.limit)
    source = resolve(request.model)
    with processes.main_first():
        device = request.device or processes.device
        policy = load_policy(request.model, dtype=getattr(torch, request.dtype), device=device)
    if request.adapter is not None:
        load_adapter(policy, request.adapter, _ADAPTER)
        source = replace(source, adapter=lora_path(Path(request.adapter)))
    preset = choose_preset(request.preset, source.model, type(policy).__name__).changed(**request.changes)
    shots = plan(prompts.prompts, preset, request.layout)
    with processes.main_first():
        record = describe(policy, source, prompts, preset, request.layout, request.batch_size)
        begin_or_continue(request.output, record)
    now = sum(processes.exchange(draw(policy, shots, preset, request.output, processes, request.batch_size)))
    if processes.is_main:
        finish(shots, request.output, request.layout)
    processes.wait()
    return Drawn(len(shots), now, preset.name)


def describe(
    policy: Policy, source: Source, prompts: PromptSet, preset: SamplingPreset, layout: str, batch_size: int
) -> dict[str, Any]:
    """Return the manifest: everything that the images depend on, and the versions they were made with."""
    adapter = None
    if source.adapter is not None:
        adapter = {"path": str(source.adapter), "sha256": sha256_of(source.adapter)}
    height, width = _size(policy, preset)
    bundled = Path(source.model).name
    return {
        "preset": preset.name,
        "sampling": {
            "sampler": f"{type(policy.process).__name__}, deterministic",
            **{key: value for key, value in asdict(preset).items() if key not in ("name", "resolution")},
            "height": height,
            "width": width,
            "dtype": str(policy.dtype).removeprefix("torch."),
            "batch_size": batch_size,
        },
        "prompts": {
            "name": prompts.name,
            "sha256": prompts.sha256,
            "total": prompts.total,
            "used": len(prompts.prompts),
        },
        "model": {
            "name": bundled if is_bundled(bundled) else source.model,
            "fingerprint": policy.fingerprint(),
            "adapter": adapter,
        },
        "layout": layout,
        ENVIRONMENT: environment(),
    }


def _size(policy: Policy, preset: SamplingPreset) -> tuple[int, int]:
    return (preset.resolution, preset.resolution) if preset.resolution else policy.default_resolution


def blocks(shots: Sequence[Shot], batch_size: int, workers: Workers) -> Iterator[Sequence[Shot]]:
    """Yield the blocks of this process."""
    for number, start in enumerate(range(0, len(shots), batch_size)):
        if number % workers.world_size == workers.rank:
            yield shots[start : start + batch_size]


def draw(
    policy: Policy,
    shots: Sequence[Shot],
    preset: SamplingPreset,
    folder: Path,
    workers: Workers,
    batch_size: int,
    progress: Callable[[int], None] = lambda images: None,
) -> int:
    """Draw this process's share of what is missing; each file appears whole or not at all.

    Args:
        policy: the model.
        shots: all images, of all processes.
        preset: sampling settings.
        folder: where to.
        workers: this process among all.
        batch_size: images of a block.
        progress: told the number of images after each block.

    Returns:
        the number of images drawn now.

    Raises:
        UserError: if a file cannot be written.
    """
    drawn = 0
    for block in blocks(shots, batch_size, workers):
        if not all((folder / shot.place).is_file() for shot in block):
            images = generate(
                policy,
                [shot.prompt for shot in block],
                [shot.seed for shot in block],
                num_steps=preset.steps,
                guidance_scale=preset.guidance,
                resolution=_size(policy, preset),
                batch_size=batch_size,
            )
            for shot, image in zip(block, images, strict=True):
                save_image(image, folder / shot.place)
            drawn += len(block)
        progress(len(block))
    return drawn


def save_image(image: Tensor, path: Path) -> None:
    """Write an image (3, height, width) in [0, 1] under a temporary name, then rename it.

    Raises:
        UserError: if it cannot be written.
    """
    pixels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    draft = path.with_name(f".{os.getpid()}.tmp")
    kind: Mapping[str, Any] = {"format": "PNG"} if path.suffix == ".png" else {"format": "JPEG", "quality": 95}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(draft, **kind)
        draft.replace(path)
    except OSError as problem:
        draft.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {problem}") from problem


def finish(shots: Sequence[Shot], folder: Path, layout: str) -> None:
    """Write the table of all images and what else the layout wants; for one process, after all have drawn.

    Raises:
        UserError: if an image is missing.
    """
    if missing := [shot.place for shot in shots if not (folder / shot.place).is_file()]:
        raise UserError(f"{len(missing)} of {len(shots)} images were not drawn, first {missing[0]}; run this again")
    for place, text in companions(shots, layout).items():
        write_text(folder / place, text)
    write_jsonl(folder / TABLE, [shot.row() for shot in shots])
