"""Several models on one benchmark, in one command: ``python eval/evaluate.py --models '[base=tiny-sd, sft=runs/sft]'``.

Draws the images of every model with the same seeds, judges them by GenEval's rules where the captions are in its
format, scores them by all rewards, compares every model with the first, and puts it all on one page (report.html).
"""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.cli.quiet import quiet_environment, quiet_libraries


def evaluate(
    models: list[str],
    prompts: str = "world",
    output: Path = Path("evaluation"),
    rewards: str = "tiny-pickscore,verifier,graded,incompressibility",
    detector: str = "world",
    colors: str | None = None,
    preset: str | None = None,
    steps: int | None = None,
    images_per_prompt: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    device: str = "auto",
    report: bool = True,
) -> int:
    """Draw, judge, score and compare.

    Args:
        models: NAME=MODEL; a model is a bundled name, a folder, a hub name or the folder of a training run. The first
            is what the others are compared with.
        prompts: captions, as of eval/generate.py.
        output: one folder a model, winrates.json and summary.md; a stopped evaluation goes on where it was.
        rewards: scorers; those of the bundled world need no download.
        detector: GenEval's, as of eval/geneval.py.
        colors: CLIP model that names colours where the detector does not; "official" for OpenAI's ViT-L/14.
        preset: named sampling settings; those of the model by default.
        steps: denoising steps.
        images_per_prompt: images of each caption.
        limit: use only the first captions of the set.
        batch_size: images drawn at once.
        device: where images are drawn and judged; auto is an accelerator where there is one, for each process its own.
        report: write report.html, with plots and report.md beside it; training runs show their curves.
    """
    quiet_environment()
    quiet_libraries()
    from diffalign.device import AUTO, choose_device
    from diffalign.evaluation.generation import Request
    from diffalign.evaluation.geneval.evaluate import Eyes
    from diffalign.evaluation.report.entries import is_run, read_entries
    from diffalign.evaluation.report.write import ReportOptions, write_report
    from diffalign.evaluation.suite import as_table, parse_models, run_suite
    from diffalign.records import write_text
    from diffalign.rewards.compose import load_parts, parse_rewards
    from diffalign.training.processes import Processes

    named = parse_models(models)
    processes = Processes()
    place = str(processes.device) if device == AUTO else choose_device(device)
    parts = load_parts(parse_rewards(rewards), place)
    changes = {"steps": steps, "images_per_prompt": images_per_prompt}
    request = Request("", prompts, output, None, preset, changes, limit=limit, batch_size=batch_size, device=place)
    results = run_suite(named, request, parts, Eyes.load(detector, colors, place), processes)
    if results:
        table = as_table(results)
        write_text(output / "summary.md", table)
        sys.stdout.write(table)
        if report:
            runs = [f"{name}={model}" for name, model in named.items() if is_run(Path(model))]
            images = [f"{result.name}={result.folder}" for result in results]
            page = write_report(read_entries([*images, *runs]), output, ReportOptions(title=" / ".join(named)))
            sys.stdout.write(f"{page}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(evaluate, as_positional=False)))
