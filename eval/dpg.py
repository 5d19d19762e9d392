"""DPG-Bench from answers: ``python eval/dpg.py --questions dpg_bench.csv --answers ANSWERS``."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from diffalign.cli.main import run_command


def dpg(questions: Path, answers: Path, judge: str, output: Path | None = None, official: bool = False) -> int:
    """Summarise yes-or-no answers.

    Args:
        questions: dpg_bench.csv of github.com/TencentQQGYLab/ELLA.
        answers: JSONL rows of item_id, tile (which image of the caption), proposition_id and answer.
        judge: name of the model that answered; officially mPLUG-large.
        output: JSON file for the figures.
        official: keep two oddities of the official script: its first question is lost, and categories are counted on
            the last image of a caption only.
    """
    from diffalign.evaluation.dpg import as_dict, read_answers, read_questions, summarise
    from diffalign.records import sha256_of, write_json

    summary = summarise(read_questions(questions, official), read_answers(answers), official)
    label = "dpg" if judge == "mPLUG-large" and official else f"dpg-like ({judge})"
    sys.stdout.write(
        f"{label}: {summary.score:.2f} over {len(summary.prompts)} captions, {summary.images} images\n"
        + "".join(f"{name}: {value:.2f}\n" for name, value in summary.broad.items())
    )
    if output is not None:
        record = {"benchmark": label, "judge": judge, "official": official, "questions_sha256": sha256_of(questions)}
        write_json(output, {**record, "answers_sha256": sha256_of(answers), **as_dict(summary)})
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(dpg, as_positional=False)))
