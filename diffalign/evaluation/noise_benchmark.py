"""Noise optimisation on a benchmark's captions, beside best-of-n with as many generations; resumable.

Captions are worked off in blocks of fixed members. A caption's row appears last of all its files, and a block without
all of its rows is done again: a stopped run goes on where it was, and its result is the same to the bit (on a CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from diffalign.evaluation.manifest import ENVIRONMENT, begin_or_continue
from diffalign.evaluation.prompt_sets import EvalPrompt, PromptSet
from diffalign.evaluation.winrate import Estimate, bootstrap_mean
from diffalign.inference.noise_result import NoiseResult
from diffalign.inference.optimize_noise import best_of_n, load_model, optimize_noise
from diffalign.records import read_json, write_json, write_jsonl
from diffalign.rewards.base import Reward
from diffalign.rewards.combine import WeightedSum
from diffalign.rewards.compose import load_parts, parse_rewards
from diffalign.rewards.given import weighted
from diffalign.rewards.preprocess import to_tensor
from diffalign.training.runfolder import environment

START, SEARCH, BASELINE = "start", "search", "best_of_n"


@dataclass(frozen=True)
class _Work:
    """What a run loads once."""

    model: Any
    reward: WeightedSum
    judges: Mapping[str, Reward]


@dataclass(frozen=True)
class NoiseBenchmark:
    """What is run for every caption.

    Args:
        model: as :func:`optimize_noise` takes it by name.
        rewards: what is optimised, ``NAME[@SOURCE][:WEIGHT]`` separated by commas.
        judges: further rewards that only look at the results, likewise; empty for none.
        steps: iterations of the search, and images of the baseline.
        baseline: run best-of-n too.
        batch_size: captions side by side.
        seed: caption i starts from seed + i.
        sampling: options of both (``NoiseOptions``): num_inference_steps, guidance_scale, ...
        search: options of the search alone (``SearchSettings``): learning_rate, norm_weight, ...
    """

    model: str
    rewards: str
    judges: str = ""
    steps: int = 50
    baseline: bool = True
    batch_size: int = 4
    seed: int = 0
    sampling: Mapping[str, Any] = field(default_factory=dict)
    search: Mapping[str, Any] = field(default_factory=dict)

    def run(
        self,
        prompts: PromptSet,
        folder: Path,
        pipeline: Any = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> dict[str, Any]:
        """Do what is missing in a folder and summarise all of it.

        Args:
            prompts: the captions.
            folder: where everything is written; one that exists is continued if it was begun with the same settings.
            pipeline: what images are made with; loaded by the model's name by default.
            progress: told how many captions are done.

        Returns:
            the summary, which ``summary.json`` holds too.

        Raises:
            UserError: for a folder of other settings, unknown names, or a file that cannot be written.
        """
        begin_or_continue(folder, self._manifest(prompts))
        work: _Work | None = None
        for block in self._blocks(len(prompts.prompts)):
            if not all(_row_file(folder, index).is_file() for index in block):
                work = work or self._load(pipeline)
                self._do(block, [prompts.prompts[index] for index in block], work, folder)
            progress(block[-1] + 1)
        rows = [read_json(_row_file(folder, index)) for index in range(len(prompts.prompts))]
        return self._finish(rows, prompts, folder)

    def _blocks(self, count: int) -> Iterator[range]:
        for first in range(0, count, self.batch_size):
            yield range(first, min(first + self.batch_size, count))

    def _load(self, pipeline: Any) -> _Work:
        model = load_model(self.model, self.sampling.get("dtype")) if pipeline is None else pipeline
        judges = load_parts(parse_rewards(self.judges)) if self.judges else {}
        return _Work(model, weighted(self.rewards, model.device), judges)

    def _do(self, block: Sequence[int], prompts: Sequence[EvalPrompt], work: _Work, folder: Path) -> None:
        texts = [prompt.text for prompt in prompts]
        shared: dict[str, Any] = {
            **self.sampling,
            "seed": [self.seed + index for index in block],
            "metadata": [prompt.metadata or {} for prompt in prompts],
        }
        results = {SEARCH: optimize_noise(work.model, texts, work.reward, steps=self.steps, **shared, **self.search)}
        if self.baseline:
            results[BASELINE] = best_of_n(work.model, texts, work.reward, n=self.steps, **shared)
        for place, (index, prompt) in enumerate(zip(block, prompts, strict=True)):
            own = {name: found[place] for name, found in results.items()}
            for name, result in own.items():
                result.save(folder / name, _name(index))
            write_json(_row_file(folder, index), _row(prompt, own, work.judges))

    def _manifest(self, prompts: PromptSet) -> dict[str, Any]:
        described = {"name": prompts.name, "sha256": prompts.sha256, "used": len(prompts.prompts)}
        sampling = {name: str(v) if isinstance(v, torch.dtype) else v for name, v in self.sampling.items()}
        return {**asdict(self), "sampling": sampling, "prompts": described, ENVIRONMENT: environment()}

    def _finish(self, rows: Sequence[Mapping[str, Any]], prompts: PromptSet, folder: Path) -> dict[str, Any]:
        summary: dict[str, Any] = {"captions": len(rows), "generations": self.steps, "rewards": {}}
        for name in rows[0][START]:
            columns = {kind: [row[kind][name] for row in rows] for kind in (START, SEARCH, BASELINE) if kind in rows[0]}
            means = {kind: sum(values) / len(values) for kind, values in columns.items()}
            gains = {
                f"search - {kind}": str(_gain(columns[SEARCH], columns[kind])) for kind in columns if kind != SEARCH
            }
            summary["rewards"][name] = {**means, **gains}
        for kind in (SEARCH, BASELINE) if self.baseline else (SEARCH,):
            table = [
                {"image": f"{_name(index)}.png", "prompt": prompt.text, "metadata": prompt.metadata}
                for index, prompt in enumerate(prompts.prompts)
            ]
            write_jsonl(folder / kind / "images.jsonl", table)
        write_json(folder / "summary.json", summary)
        return summary


def _gain(better: Sequence[float], than: Sequence[float]) -> Estimate:
    """Mean of the paired differences with its interval over captions."""
    return bootstrap_mean((torch.tensor(better, dtype=torch.float64) - torch.tensor(than, dtype=torch.float64))[None])


def _row(prompt: EvalPrompt, results: Mapping[str, NoiseResult], judges: Mapping[str, Reward]) -> dict[str, Any]:
    """Every reward of the start and of each result: the optimised ones, then the judges'."""
    search = results[SEARCH]
    first = {name: values[0] for name, values in search.history.items()}
    scores = {START: first, **{name: result.scores for name, result in results.items()}}
    pictures = {START: search.first_image, **{name: result.image for name, result in results.items()}}
    for label, judge in judges.items():
        for kind, picture in pictures.items():
            with torch.no_grad():
                seen = judge.score(to_tensor(picture)[None], [prompt.text], [prompt.metadata or {}])
            scores[kind] = {**scores[kind], label: float(seen[0])}
    return {"prompt": prompt.text, "iteration": search.iteration, "generations": search.generations, **scores}


def _name(index: int) -> str:
    return f"{index:05d}"


def _row_file(folder: Path, index: int) -> Path:
    return folder / "rows" / f"{_name(index)}.json"
