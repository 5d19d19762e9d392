"""Several models on one benchmark: images, GenEval's verdicts, scores, win rates over the first model, one report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.evaluation.comparison import Comparison, pair, read_set
from diffalign.evaluation.generation import Request, draw_request
from diffalign.evaluation.geneval.evaluate import RESULTS_FOLDER, Eyes, evaluate, write_results
from diffalign.evaluation.geneval.folder import read_folder
from diffalign.evaluation.geneval.verdict import Rules
from diffalign.evaluation.manifest import generation_of
from diffalign.evaluation.prompt_sets import load_prompts
from diffalign.records import write_json
from diffalign.rewards.base import Reward
from diffalign.rewards.scoring import score_items, write_scores
from diffalign.training.processes import Processes

WIN_RATES = "winrates.json"
SCORES = "scores.jsonl"


@dataclass(frozen=True)
class ModelResult:
    """What is found out about a model.

    Args:
        name: as the reader calls it.
        folder: its images, with ``scores.jsonl`` and ``geneval/`` beside them.
        means: reward -> mean over images.
        geneval: overall score; None where the captions are not GenEval's.
        rates: reward -> win rate over the first model, as in ``Comparison.summary``; empty for the first.
    """

    name: str
    folder: Path
    means: Mapping[str, float]
    geneval: float | None
    rates: Mapping[str, Mapping[str, Any]]


def parse_models(models: Sequence[str]) -> dict[str, str]:
    """Read ``NAME=MODEL`` entries.

    Raises:
        UserError: for another form, or a name twice.
    """
    named: dict[str, str] = {}
    for text in models:
        name, found, model = text.partition("=")
        if not (found and name and model) or "/" in name:
            raise UserError(f"{text!r} is no model: expected NAME=MODEL, for example base=tiny-sd")
        if name in named:
            raise UserError(f"two models are called {name!r}")
        named[name] = model
    return named


def run_suite(
    models: Mapping[str, str], request: Request, rewards: Mapping[str, Reward], eyes: Eyes, processes: Processes
) -> list[ModelResult]:
    """Draw and judge; what is there already is not drawn again.

    Args:
        models: name -> model; the first is what the others are measured against.
        request: how to draw; its model and layout are set for each model, its output holds one folder a model.
        rewards: label -> reward.
        eyes: GenEval's, for captions that are in its format.
        processes: draw together; one of them judges.

    Returns:
        one result a model, in the main process; none in the others.
    """
    captions = load_prompts(request.prompts).first(request.limit).prompts
    structured = all(caption.metadata is not None and "include" in caption.metadata for caption in captions)
    layout = "geneval" if structured else request.layout
    folders = {name: request.output / name for name in models}
    for name, model in models.items():
        draw_request(replace(request, model=model, output=folders[name], layout=layout), processes)
    if not processes.is_main:
        return []
    sets = {name: read_set(folder) for name, folder in folders.items()}
    scores = {name: score_items(list(images.entries.values()), rewards) for name, images in sets.items()}
    first = next(iter(models))
    results = []
    for name, folder in folders.items():
        write_scores(folder / SCORES, list(sets[name].entries.values()), rewards, scores[name], generation_of(folder))
        keys, _ = pair(sets[name], sets[first])
        compared = {
            label: Comparison(keys, scores[name][label], scores[first][label]).summary(label) for label in rewards
        }
        results.append(
            ModelResult(
                name,
                folder,
                {label: values.mean().item() for label, values in scores[name].items()},
                geneval_score(folder, eyes) if structured else None,
                {} if name == first else compared,
            )
        )
    write_json(request.output / WIN_RATES, {result.name: dict(result.rates) for result in results})
    return results


def geneval_score(folder: Path, eyes: Eyes) -> float:
    """Judge a folder in GenEval's layout by the official rules, write the results beside it, return the overall score.

    Raises:
        UserError: as ``eval/geneval.py`` does.
    """
    drawn, rules = generation_of(folder), Rules()
    samples = read_folder(folder, None if drawn is None else drawn["prompts"]["used"])
    verdicts = list(evaluate(folder, samples, eyes, rules))
    return write_results(folder / RESULTS_FOLDER, folder, verdicts, eyes, rules).overall


def as_table(results: Sequence[ModelResult]) -> str:
    """Return the figures as a table in markdown, win rates with their 95 % intervals."""
    labels = list(results[0].means)
    head = ["model", *labels, *(["geneval-like"] if results[0].geneval is not None else [])]
    head += [f"win rate by {label}" for label in labels]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for result in results:
        cells = [result.name, *(f"{result.means[label]:.4f}" for label in labels)]
        cells += [f"{result.geneval:.4f}"] if result.geneval is not None else []
        for label in labels:
            rate = result.rates.get(label)
            cells.append(rate["shown"] if rate else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"
