"""Named, versioned sampling settings of evaluations. A change of any field shows in the name that reports print."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from diffalign.bundled import is_bundled
from diffalign.errors import UserError, unknown

SeedRule = Literal["per_prompt", "shared"]
SAMPLE_STRIDE = 1_000_003
"""Between the seeds of two images of one caption; more than any benchmark has captions."""


@dataclass(frozen=True)
class SamplingPreset:
    """How images of an evaluation are drawn.

    Args:
        name: with its version; settings under a name never change.
        steps: denoising steps.
        guidance: classifier-free guidance; 1 switches it off.
        images_per_prompt: images of each caption.
        seed: base seed.
        seed_rule: "per_prompt": caption i starts from seed + i; "shared": all captions start from the same noise.
        resolution: side in pixels; the model's own by default.
    """

    name: str
    steps: int
    guidance: float
    images_per_prompt: int = 1
    seed: int = 0
    seed_rule: SeedRule = "per_prompt"
    resolution: int | None = None

    def __post_init__(self) -> None:
        if self.steps < 1 or self.images_per_prompt < 1:
            raise UserError(
                f"steps and images per prompt must be positive, not {self.steps} and {self.images_per_prompt}"
            )

    def seed_of(self, index: int, sample: int) -> int:
        """Seed of an image; two models evaluated with one preset start from the same noise.

        Args:
            index: place of the caption in its set.
            sample: which of the caption's images.
        """
        return self.seed + (index if self.seed_rule == "per_prompt" else 0) + sample * SAMPLE_STRIDE

    def changed(self, **options: Any) -> SamplingPreset:
        """Return the preset with the options that are not None, named after what differs."""
        values = {key: value for key, value in options.items() if value is not None and value != getattr(self, key)}
        if not values:
            return self
        name = f"{self.name} ({', '.join(f'{key}={value}' for key, value in sorted(values.items()))})"
        return SamplingPreset(**{**asdict(self), **values, "name": name})


PRESETS = {
    preset.name: preset
    for preset in (
        # Settings of the leaderboard: the guidance at which the bundled start scores best.
        SamplingPreset("tiny-v1", steps=15, guidance=3.0),
        # Both have learned a teacher's guided predictions.
        SamplingPreset("tiny-sd3-v1", steps=15, guidance=1.0),
        SamplingPreset("tiny-sd-turbo-v1", steps=1, guidance=1.0),
        # Defaults of diffusers' pipelines of these families.
        SamplingPreset("sd-v1", steps=50, guidance=7.5),
        SamplingPreset("sdxl-v1", steps=50, guidance=5.0),
        SamplingPreset("sd3-v1", steps=28, guidance=7.0),
        # The official generation script: four images, the same noise for all captions.
        SamplingPreset("geneval-v1", steps=50, guidance=9.0, images_per_prompt=4, seed=42, seed_rule="shared"),
    )
}
_FAMILIES = {"UNetPolicy": "sd-v1", "SDXLPolicy": "sdxl-v1", "SD3Policy": "sd3-v1"}
FIELDS = tuple(field.name for field in fields(SamplingPreset) if field.name != "name")


def choose_preset(name: str | None, model: str, family: str) -> SamplingPreset:
    """Return a preset by name, else that of a bundled model, else that of the model's family.

    Args:
        name: as given.
        model: name or folder of the pipeline.
        family: class of its policy.

    Raises:
        UserError: for an unknown name.
    """
    if name is None:
        own, bundled = f"{Path(model).name}-v1", is_bundled(Path(model).name)
        name = own if bundled and own in PRESETS else "tiny-v1" if bundled else _FAMILIES.get(family, "sd-v1")
    if name not in PRESETS:
        raise unknown("preset", name, PRESETS)
    return PRESETS[name]
