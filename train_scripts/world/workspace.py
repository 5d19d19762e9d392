"""Where a build of the bundled world writes, and how much work it does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Workspace:
    """Folders and effort of one build.

    Args:
        out: finished assets, one folder each.
        cache: checkpoints, latents and samples; a stopped build continues from them.
        effort: share of the full number of steps and samples; small values try the whole build in a minute.
    """

    out: Path
    cache: Path
    effort: float = 1.0

    def amount(self, full: int, least: int = 2) -> int:
        """Scale a number of steps or samples by the effort."""
        return max(least, round(full * self.effort))

    def folder(self, stage: str) -> Path:
        """Return (and make) the cache folder of a stage."""
        path = self.cache / stage
        path.mkdir(parents=True, exist_ok=True)
        return path
