"""What came of a search of noise, in forms that a notebook and a folder can take."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import MissingExtra, UserError
from diffalign.inference.noise_judge import Found
from diffalign.policies.saving import write_safetensors
from diffalign.records import write_json


@dataclass(frozen=True)
class NoiseResult:
    """The best image of a caption.

    Args:
        prompt: the caption.
        seed: of the noise that the search started from.
        image: the best image.
        first_image: the image of the start, the model's plain answer to the seed.
        noise: (channels, ...) that the best image comes from, on the CPU.
        iteration: that found it; 0 is the start.
        total: its weighted reward.
        history: reward, and "total", -> its value in every iteration made.
    """

    prompt: str
    seed: int
    image: Image.Image
    first_image: Image.Image
    noise: Tensor
    iteration: int
    total: float
    history: Mapping[str, list[float]]

    @classmethod
    def of(cls, found: Found, prompt: str, seed: int) -> NoiseResult:
        """Take over what a search found."""
        return cls(
            prompt,
            seed,
            to_picture(found.image),
            to_picture(found.first_image),
            found.noise.cpu(),
            found.iteration,
            found.total,
            found.history,
        )

    @property
    def generations(self) -> int:
        """Images that were made, hence forward passes of the generator."""
        return len(self.history["total"])

    @property
    def scores(self) -> dict[str, float]:
        """Every reward, and "total", of the best image."""
        return {name: values[self.iteration] for name, values in self.history.items()}

    def record(self) -> dict[str, Any]:
        """Everything but pictures and noise, for JSON."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "iteration": self.iteration,
            "generations": self.generations,
            "first": {name: values[0] for name, values in self.history.items()},
            "best": self.scores,
            "history": dict(self.history),
        }

    def plot(self) -> Any:
        """Draw start, best image and the course of every reward; returns matplotlib's figure, which notebooks show.

        Raises:
            MissingExtra: without matplotlib.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise MissingExtra("matplotlib", "eval", "the plot of a search") from error
        single = len(self.history) == 2  # a reward and its weighted self
        curves = [name for name in self.history if name != "total" or not single]
        figure = Figure(figsize=(5 + 2.6 * len(curves), 2.6), layout="constrained")
        axes = figure.subplots(1, 2 + len(curves), width_ratios=[1, 1, *[1.2] * len(curves)])
        shown = {"start": self.first_image, f"best (iteration {self.iteration})": self.image}
        for axis, (title, picture) in zip(axes[:2], shown.items(), strict=True):
            axis.imshow(picture)
            axis.set_title(title, fontsize=9)
            axis.set_axis_off()
        for axis, name in zip(axes[2:], curves, strict=True):
            axis.plot(self.history[name], color="#2b5c8a")
            axis.axvline(self.iteration, color="#999999", linewidth=1)
            axis.set_title(name, fontsize=9)
            axis.set_xlabel("iteration", fontsize=8)
        figure.suptitle(self.prompt, fontsize=10)
        return figure

    def save(self, folder: Path, name: str = "result") -> Path:
        """Write ``NAME.png``, ``NAME-first.png``, ``NAME.safetensors`` (the noise) and, last, ``NAME.json``.

        Returns:
            the JSON file; it is there only if all others are.

        Raises:
            UserError: if something cannot be written.
        """
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for suffix, picture in (("", self.image), ("-first", self.first_image)):
                draft = folder / f".{name}{suffix}.tmp"
                picture.save(draft, format="PNG")
                draft.replace(folder / f"{name}{suffix}.png")
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error}") from error
        write_safetensors(folder / f"{name}.safetensors", {"noise": self.noise.contiguous()}, {"prompt": self.prompt})
        write_json(folder / f"{name}.json", self.record())
        return folder / f"{name}.json"

    def _repr_png_(self) -> bytes | None:
        """Show start and best image side by side in a notebook."""
        both = Image.new("RGB", (self.first_image.width + self.image.width + 4, self.image.height), "white")
        both.paste(self.first_image, (0, 0))
        both.paste(self.image, (self.first_image.width + 4, 0))
        return both._repr_png_()


def to_picture(image: Tensor) -> Image.Image:
    """Turn (3, height, width) in [0, 1] into a picture."""
    pixels = (image.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
    return Image.fromarray(pixels.permute(1, 2, 0).numpy())
