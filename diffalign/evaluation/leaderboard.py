"""All methods side by side on the bundled world: one cell a (method, training seed), one JSON file a cell.

A cell trains from the bundled base with the method's own preset and scores the TEST captions with the seeds that the
base was scored with. Its file is keyed by hashes of code, configuration, assets and test settings: what has not changed
is not run again, and an interrupted board goes on where it stopped. Cells of older code stay on the board, marked,
until they are run again; those of other assets or settings cannot be compared and are left out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import diffalign
from diffalign.bundled import assets_root
from diffalign.errors import UserError, unknown
from diffalign.evaluation.evaluator import Evaluation, ImageEvaluator
from diffalign.evaluation.winrate import Estimate, bootstrap_mean, wins
from diffalign.inference.generate import generate
from diffalign.policies.loading import load_policy
from diffalign.strategies.registry import list_methods
from diffalign.training.resolve import resolve_config

BASE = "base"
BEST_OF_4 = "best_of_4"
_CODE = ("data", "diffusion", "inference", "policies", "rewards", "strategies", "training", "world")


@dataclass(frozen=True)
class BoardSettings:
    """What is measured.

    Args:
        model: bundled model that every cell starts from.
        test_prompt_seed: draws the TEST captions and their initial noise.
        captions: number of test captions.
        num_steps, guidance_scale: of sampling.
    """

    model: str = "tiny-sd"
    test_prompt_seed: int = 0
    captions: int = 400
    num_steps: int = 15
    guidance_scale: float = 3.0


@dataclass(frozen=True)
class Cell:
    """A method (or a baseline without training) and the seed it is trained with."""

    method: str
    seed: int

    @staticmethod
    def parse(text: str) -> Cell:
        """Read ``method:seed``.

        Raises:
            UserError: for another form, or an unknown method.
        """
        name, _, seed = text.partition(":")
        known = [BASE, BEST_OF_4, *board_methods()]
        if name not in known:
            raise unknown("leaderboard row", name, known)
        if not (seed or "0").isdigit():
            raise UserError(f"{text!r} is no cell: expected METHOD:SEED, for example sft:0")
        return Cell(name, int(seed or 0))


def board_methods() -> list[str]:
    """Return the methods that have a row: all image methods that train the model."""
    return [method.name for method in list_methods("image") if method.strategy.spec.trains == "policy"]


def cell_key(cell: Cell, settings: BoardSettings) -> str:
    """Hash of everything that the cell's result depends on."""
    trained = cell.method not in {BASE, BEST_OF_4}
    config = resolve_config(cell.method, {"seed": cell.seed}).flat() if trained else {}
    parts = {
        "cell": asdict(cell),
        "settings": asdict(settings),
        "config": config,
        "code": code_hash(),
        "assets": assets_hash(),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


@cache
def code_hash() -> str:
    """Hash of the modules that decide what a run computes."""
    root = Path(diffalign.__file__).parent
    return _hash_files(path for part in _CODE for path in sorted((root / part).rglob("*.py")))


@cache
def assets_hash() -> str:
    """Hash of the bundled models and data."""
    return _hash_files(p for p in sorted(assets_root().rglob("*")) if p.is_file() and p.suffix != ".md")


def _hash_files(paths: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def run_cell(cell: Cell, settings: BoardSettings, evaluator: ImageEvaluator, run_folder: Path) -> dict[str, Any]:
    """Train (where there is something to train), sample, score; returns the content of the cell's file.

    Args:
        cell: what to run.
        settings: of the board.
        evaluator: for the test captions.
        run_folder: where the training run is kept.
    """
    started = time.perf_counter()
    model: str | Path = settings.model
    if cell.method not in {BASE, BEST_OF_4}:
        quiet = {"evaluation_prompts": 0, "num_validation_images": 0}
        model = diffalign.train(method=cell.method, seed=cell.seed, output_dir=str(run_folder), **quiet).folder
    trained = time.perf_counter()
    policy = load_policy(model)
    if cell.method == BEST_OF_4:
        result = best_of(4, policy, evaluator, settings)
    else:
        result = evaluator.evaluate(policy, settings.num_steps, settings.guidance_scale)
    return {
        "cell": asdict(cell),
        "key": cell_key(cell, settings),
        "assets": assets_hash(),
        "settings": asdict(settings),
        "train_seconds": round(trained - started, 1),
        "sample_seconds": round(time.perf_counter() - trained, 1),
        "hardware": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "kinds": list(result.kinds),
        "scores": {name: [round(v, 5) for v in values.tolist()] for name, values in result.scores.items()},
    }


def best_of(count: int, policy: Any, evaluator: ImageEvaluator, settings: BoardSettings) -> Evaluation:
    """Draw ``count`` images a caption and keep the one that the primary reward prefers: a baseline without training."""
    best: Tensor | None = None
    chosen: Tensor | None = None
    for draw in range(count):
        seeds = [seed + draw * 7_919_000_017 for seed in evaluator.seeds]
        images = generate(
            policy, evaluator.prompts, seeds, num_steps=settings.num_steps, guidance_scale=settings.guidance_scale
        )
        scores = evaluator.rewards[evaluator.primary].score(images, evaluator.prompts, evaluator.metadata)
        if best is None or chosen is None:
            best, chosen = scores, images
            continue
        better = scores > best
        best = torch.where(better, scores, best)
        chosen = torch.where(better[:, None, None, None], images, chosen)
    assert chosen is not None
    return evaluator.score(chosen)


class Board:
    """The files of a board.

    Args:
        folder: where the cells' files are kept.
        runs: where training runs go.
        settings: what is measured.
    """

    def __init__(self, folder: Path, runs: Path, settings: BoardSettings) -> None:
        self.folder, self.runs, self.settings = folder, runs, settings

    def path(self, cell: Cell) -> Path:
        """File of a cell."""
        return self.folder / f"{cell.method}-{cell.seed}-prompts{self.settings.test_prompt_seed}.json"

    def load(self, cell: Cell) -> dict[str, Any] | None:
        """Return a cell's content if it is there and was measured with these assets and settings."""
        path = self.path(cell)
        if not path.is_file():
            return None
        content = json.loads(path.read_text())
        same = content["assets"] == assets_hash() and content["settings"] == asdict(self.settings)
        return content if same else None

    def is_current(self, cell: Cell) -> bool:
        """Whether the cell is there and nothing that it depends on, code included, has changed since."""
        content = self.load(cell)
        return content is not None and content["key"] == cell_key(cell, self.settings)

    def fill(self, cells: Iterable[Cell], make_evaluator: Callable[[], ImageEvaluator]) -> None:
        """Run the cells that are missing, one at a time; each file appears whole or not at all."""
        missing = [cell for cell in cells if not self.is_current(cell)]
        evaluator = make_evaluator() if missing else None
        self.folder.mkdir(parents=True, exist_ok=True)
        for cell in missing:
            assert evaluator is not None
            run_folder = self.runs / f"{cell.method}-{cell.seed}-{cell_key(cell, self.settings)}"
            content = run_cell(cell, self.settings, evaluator, run_folder)
            draft = self.path(cell).with_suffix(".tmp")
            draft.write_text(json.dumps(content))
            draft.rename(self.path(cell))

    def rows(self, cells: Iterable[Cell]) -> list[Row]:
        """Compare every method that has files with the base."""
        base = self.load(Cell(BASE, 0))
        if base is None:
            raise UserError("the board has no row for the base model yet: run it with --only base:0")
        by_method: dict[str, list[dict[str, Any]]] = {}
        older = set()
        for cell in cells:
            content = self.load(cell)
            if content is not None:
                by_method.setdefault(cell.method, []).append(content)
                older |= set() if self.is_current(cell) else {cell.method}
        return [compare(method, runs, base, method in older) for method, runs in by_method.items()]


@dataclass(frozen=True)
class Row:
    """A method against the base over its training seeds; intervals over seeds and captions.

    Args:
        method: its name.
        seeds: number of training seeds.
        win_rate: by the proxy reward, against the base.
        verifier, graded, proxy: mean scores.
        verifier_change: paired difference to the base's verdicts.
        by_kind: verifier score for each kind of caption.
        train_seconds: mean.
        older: some of its cells were measured with code that has changed since.
    """

    method: str
    seeds: int
    win_rate: Estimate
    proxy: float
    verifier: float
    graded: float
    verifier_change: Estimate
    by_kind: Mapping[str, float]
    train_seconds: float
    older: bool = False

    @property
    def verdict(self) -> str:
        """What the intervals allow to say."""
        if self.method == BASE:
            return "the start"
        rises = "rises" if self.win_rate.low > 0.5 else "falls" if self.win_rate.high < 0.5 else "undecided"
        lowered = "; verifier lowered" if self.verifier_change.high < 0 else ""
        return rises + lowered


def compare(method: str, runs: list[dict[str, Any]], base: dict[str, Any], older: bool = False) -> Row:
    """Summarise the runs of a method."""

    def stacked(name: str) -> Tensor:
        return torch.tensor([run["scores"][name] for run in runs], dtype=torch.float64)

    proxy = next(iter(base["scores"]))
    start = {name: torch.tensor(values, dtype=torch.float64) for name, values in base["scores"].items()}
    verdicts = stacked("verifier")
    kinds = {kind: [i for i, k in enumerate(base["kinds"]) if k == kind] for kind in sorted(set(base["kinds"]))}
    return Row(
        method=method,
        seeds=len(runs),
        win_rate=bootstrap_mean(wins(stacked(proxy), start[proxy].expand(len(runs), -1))),
        proxy=stacked(proxy).mean().item(),
        verifier=verdicts.mean().item(),
        graded=stacked("graded").mean().item(),
        verifier_change=bootstrap_mean(verdicts - start["verifier"]),
        by_kind={kind: verdicts[:, index].mean().item() for kind, index in kinds.items()},
        train_seconds=sum(run["train_seconds"] for run in runs) / len(runs),
        older=older,
    )
