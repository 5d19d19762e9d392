"""What a cell is made of: training, sampling, scoring, and the curve of the run."""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import RunStopped, UserError
from diffalign.evaluation.evaluator import ImageEvaluator
from diffalign.evaluation.leaderboard.entries import SMALL_FILES, BoardSettings, Cell
from diffalign.evaluation.leaderboard.keys import assets_hash, cell_key
from diffalign.inference.generate import generate
from diffalign.policies.loading import load_policy
from diffalign.records import read_jsonl
from diffalign.rewards.jpeg import JpegSize
from diffalign.training.assemble import build_run
from diffalign.training.checkpoint import list_checkpoints
from diffalign.training.loop import RunResult
from diffalign.training.resolve import resolve_config
from diffalign.training.trackers import METRICS_FILE
from diffalign.world.evaluation import world_evaluator

FINISHED = "finished"
_DRAW_STRIDE = 7_919_000_017
"""Between the seeds of one caption's images."""


@dataclass(frozen=True)
class Training:
    """Result of training.

    Args:
        model: run folder, or the name of the start where nothing is trained.
        outcome: "finished", or why it ended early: then there is nothing to sample from.
        seconds, images: of training, as the run counted them.
        curve: [step, seconds, images, reward] of each logging interval, where the run reports a reward.
    """

    model: str | Path
    outcome: str = FINISHED
    seconds: float = 0.0
    images: int = 0
    curve: tuple[tuple[float, float, float, float], ...] = ()


def board_evaluator(settings: BoardSettings) -> ImageEvaluator:
    """Build what scores every cell: the bundled world's rewards on test captions, and what variants aim at besides."""
    evaluator = world_evaluator("test", settings.captions, settings.test_prompt_seed)
    return replace(evaluator, rewards={**evaluator.rewards, SMALL_FILES: JpegSize(compressible=True)})


def run_cell(cell: Cell, settings: BoardSettings, evaluator: ImageEvaluator, run_folder: Path) -> dict[str, Any]:
    """Train (where there is something to train), sample, score; returns the content of the cell's file.

    A run that a guard stops, or whose images are no numbers, gives a cell without scores that says so.

    Args:
        cell: what to run.
        settings: of the board.
        evaluator: for the test captions; its seeds are those of the first draw.
        run_folder: where the training run is kept.

    Raises:
        UserError: for runs that cannot start, or that were interrupted.
    """
    entry, measured = cell.entry, settings.of(cell.entry)
    training = train_cell(cell, run_folder) if entry.method else Training(entry.model)
    started = time.perf_counter()
    scores: Mapping[str, Tensor] = {}
    outcome = training.outcome
    if outcome == FINISHED:
        steps, guidance = measured["num_steps"], measured["guidance_scale"]
        scores = draw(training.model, evaluator, entry.draws, entry.best_of, num_steps=steps, guidance_scale=guidance)
        if not all(values.isfinite().all() for values in scores.values()):
            outcome, scores = "collapsed: its images are no numbers", {}
    return {
        "cell": {"row": cell.row, "seed": cell.seed},
        "key": cell_key(cell, settings),
        "assets": assets_hash(entry),
        "settings": measured,
        "draws": entry.draws,
        "rewards": entry.rewards,
        "outcome": outcome,
        "train_seconds": round(training.seconds, 1),
        "train_images": training.images,
        "sample_seconds": round(time.perf_counter() - started, 1),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "kinds": [str(row.get("tag", "all")) for row in evaluator.metadata],
        "scores": {name: [round(v, 5) for v in values.tolist()] for name, values in scores.items()},
        "curve": training.curve,
    }


def train_cell(cell: Cell, folder: Path) -> Training:
    """Train a cell, or go on where its run was interrupted.

    Raises:
        UserError: for runs that cannot start, or that were interrupted.
    """
    options = {**cell.entry.overrides(cell.seed), "output_dir": str(folder)}
    if list_checkpoints(folder / "checkpoints"):
        options["resume_from_checkpoint"] = "latest"
    else:
        shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed before its first checkpoint
    assert cell.entry.method is not None
    run = build_run(resolve_config(cell.entry.method, options))
    try:
        result: RunResult | None = run.fit()
        outcome = FINISHED
    except RunStopped as stopped:
        what_happened = re.split("[;:] ", str(stopped), maxsplit=1)[0]  # then follow advice and paths of this machine
        result, outcome = None, f"stopped: {what_happened}"
    if result is not None and result.interrupted:
        raise UserError(f"{result.interrupted} received: the same command goes on with {cell.row}:{cell.seed}")
    lines = read_jsonl(folder / METRICS_FILE) if (folder / METRICS_FILE).is_file() else []
    curve = tuple(
        (row["step"], row["seconds"], row.get("images", 0.0), row["reward"]) for row in lines if "reward" in row
    )
    last = lines[-1] if lines else {}
    return Training(folder, outcome, last.get("seconds", 0.0), int(last.get("images", 0)), curve)


def draw(
    model: str | Path, evaluator: ImageEvaluator, draws: int, best_of: int, *, num_steps: int, guidance_scale: float
) -> dict[str, Tensor]:
    """Sample and score every test caption from several initial noises.

    Args:
        model: bundled name or run folder.
        evaluator: its seeds are those of the first draw.
        draws: initial noises of a caption.
        best_of: images drawn for each that is kept, the one that the primary reward prefers.
        num_steps, guidance_scale: of sampling.

    Returns:
        reward -> (draws * captions,) scores, draw by draw.
    """
    policy = load_policy(model)
    parts = []
    for index in range(draws):
        candidates = []
        for candidate in range(index * best_of, (index + 1) * best_of):
            seeds = [seed + candidate * _DRAW_STRIDE for seed in evaluator.seeds]
            images = generate(
                policy, evaluator.prompts, seeds, num_steps=num_steps, guidance_scale=guidance_scale, batch_size=64
            )
            candidates.append(images)
        parts.append(evaluator.score(_best(candidates, evaluator)).scores)
    return {name: torch.cat([part[name] for part in parts]) for name in evaluator.rewards}


def _best(candidates: list[Tensor], evaluator: ImageEvaluator) -> Tensor:
    """Of images (n, 3, height, width) of the same captions, return for each caption the one with the highest reward."""
    if len(candidates) == 1:
        return candidates[0]
    judge = evaluator.rewards[evaluator.primary]
    scores = torch.stack([judge.score(images, evaluator.prompts, evaluator.metadata) for images in candidates])
    return torch.stack(candidates)[scores.argmax(0), torch.arange(len(evaluator.prompts))]
