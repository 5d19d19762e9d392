"""Looking at an image model while it trains: grids with the same seeds, scores before and after."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from diffalign.evaluation.drift import Probe, Samples, Start, appearance
from diffalign.evaluation.evaluator import Evaluation, ImageEvaluator
from diffalign.policies.base import Policy
from diffalign.training.config import RunOptions
from diffalign.training.judged import LookedAt
from diffalign.training.processes import Processes
from diffalign.training.runfolder import RunFolder
from diffalign.training.summary import before_and_after, print_table, write_summary
from diffalign.training.trackers import Tracker

_GAP = 2
_BEFORE = "before.json"


class ImageObserver:
    """Draws the same captions with the same seeds before, during and after a run, and scores others.

    Args:
        policy: the model, with whatever weights it has when a hook is called.
        captions: of the grid, and where those that are scored come from.
        evaluator: captions and rewards that score them, if any.
        options: sampling settings.
        resolution: (height, width) of all images in pixels: what the run trains on.
        processes: share out what is sampled; the main one decodes, scores and writes.
        console: where the table is printed.
        watched: the reward of the evaluator that early stopping watches; empty for none.
    """

    def __init__(
        self,
        policy: Policy,
        captions: LookedAt,
        evaluator: ImageEvaluator | None,
        options: RunOptions,
        resolution: tuple[int, int],
        processes: Processes,
        console: Console | None = None,
        watched: str = "",
    ) -> None:
        self._policy, self._evaluator, self._origin, self._processes = policy, evaluator, captions.origin, processes
        self._probe = Probe(captions.grid, options.num_inference_steps, options.guidance_scale, resolution)
        self._console, self._watched = console, watched
        self._settings = {
            "num_inference_steps": options.num_inference_steps,
            "guidance_scale": options.guidance_scale,
            "resolution": list(resolution),
            "captions": captions.origin,
        }

    def before(self, folder: RunFolder) -> float | None:
        """Draw the start, and score it."""
        grid, judged = self._grid(), self._judged()

        def record() -> float | None:
            if grid is not None:
                Start.of(self._policy, self._probe, self._drawn(grid, 0, folder, ())).save(_start_path(folder))
            if self._evaluator is None or judged is None:
                return None
            start = self._evaluator.judge(self._policy, judged)
            scores = {name: values.tolist() for name, values in start.scores.items()}
            (folder.path / _BEFORE).write_text(json.dumps(scores), encoding="utf-8")
            return self._watched_mean(start)

        return folder.on_main(self._processes, record)

    def during(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> float | None:
        """Draw the grid and log its figures; score the other captions where a reward watches."""
        grid, judged = self._grid(), self._judged() if self._watched else None

        def record() -> float | None:
            self._figures(grid, step, folder, trackers)
            if self._evaluator is None or judged is None:
                return None
            now = self._evaluator.judge(self._policy, judged)
            for tracker in trackers:
                tracker.log(step, {f"{self._origin}/{name}": mean for name, mean in now.means().items()})
            return self._watched_mean(now)

        return folder.on_main(self._processes, record)

    def after(self, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> dict[str, Any]:
        """Draw and score the result; write ``before_after.png`` and ``summary.json``; print the table."""
        recorded = folder.path / _BEFORE
        comparable = self._processes.together(recorded.exists)[0]  # as the main process, which wrote it, sees it
        grid, judged = self._grid(), self._judged() if comparable else None

        def record() -> dict[str, Any]:
            figures = self._figures(grid, step, folder, trackers)
            summary: dict[str, Any] = {"samples": figures} if figures else {}
            start, last = grid_path(folder, 0), grid_path(folder, step)
            if last.exists() and start.exists():
                stack_pictures([("before", start), ("after", last)], folder.path / "before_after.png")
            if self._evaluator is not None and judged is not None:
                after = self._evaluator.judge(self._policy, judged)
                scores = json.loads(recorded.read_text(encoding="utf-8"))
                tensors = {name: torch.tensor(values) for name, values in scores.items()}
                before = Evaluation(tensors, after.kinds, after.images[:0])
                summary = {**before_and_after(before, after, self._evaluator, self._settings), **summary}
                print_table(summary, self._console)
            if summary:
                write_summary(folder.path, summary)
            return summary

        return folder.on_main(self._processes, record) or {}

    def _grid(self) -> Tensor | None:
        """Sample the grid's latents, (n, channels, ...), all processes together."""
        return self._probe.latents(self._policy, self._processes) if self._probe.prompts else None

    def _judged(self) -> Tensor | None:
        """Sample the latents that are decoded and scored, (n, channels, ...), all processes together."""
        if self._evaluator is None:
            return None
        return self._evaluator.latents(self._policy, self._probe.num_steps, self._probe.guidance_scale, self._processes)

    def _watched_mean(self, evaluation: Evaluation) -> float | None:
        return evaluation.means()[self._watched] if self._watched else None

    def _figures(
        self, grid: Tensor | None, step: int, folder: RunFolder, trackers: Sequence[Tracker]
    ) -> dict[str, float]:
        """Draw the grid; return and log how its samples look and how far they are from those of the start."""
        if grid is None:
            return {}
        now, start = self._drawn(grid, step, folder, trackers), Start.load(_start_path(folder), self._probe)
        figures = {**(start.drift(self._policy, now) if start else {}), **appearance(now.images)}
        for tracker in trackers:
            tracker.log(step, figures)
        return figures

    def _drawn(self, latents: Tensor, step: int, folder: RunFolder, trackers: Sequence[Tracker]) -> Samples:
        samples = Samples.of(self._policy, latents)
        path = grid_path(folder, step)
        save_grid(samples.images, path)
        captions = "".join(f"{index}: {prompt}\n" for index, prompt in enumerate(self._probe.prompts))
        (path.parent / "prompts.txt").write_text(captions, encoding="utf-8")
        for tracker in trackers:
            tracker.image(step, "validation", path)
        return samples


def _start_path(folder: RunFolder) -> Path:
    return folder.validation / "start.safetensors"


def grid_path(folder: RunFolder, step: int) -> Path:
    """Return where the grid of a step lies."""
    return folder.validation / f"step-{step:08d}.png"


def save_grid(images: Tensor, path: Path, columns: int = 8) -> None:
    """Write images as one PNG.

    Args:
        images: (n, 3, height, width) in [0, 1].
        path: its folder is made if missing.
        columns: images in a row.
    """
    from PIL import Image

    n, _, height, width = images.shape
    columns = min(columns, n)
    rows = -(-n // columns)
    canvas = torch.ones(3, rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP)
    for index, image in enumerate(images):
        top, left = index // columns * (height + _GAP), index % columns * (width + _GAP)
        canvas[:, top : top + height, left : left + width] = image
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((canvas * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)


def stack_pictures(named: Sequence[tuple[str, Path]], path: Path) -> None:
    """Put pictures below each other, each under its name."""
    from PIL import Image, ImageDraw

    pictures = [(name, Image.open(source).convert("RGB")) for name, source in named]
    label = 14
    width = max(picture.width for _, picture in pictures)
    canvas = Image.new("RGB", (width, sum(picture.height + label for _, picture in pictures)), "white")
    pen, top = ImageDraw.Draw(canvas), 0
    for name, picture in pictures:
        pen.text((2, top + 1), name, fill="black")
        canvas.paste(picture, (0, top + label))
        top += picture.height + label
    canvas.save(path)
