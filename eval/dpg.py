"""DPG-Bench: ``python eval/dpg.py --questions dpg_bench.csv --answers ANSWERS --judge NAME [--images FOLDER]``."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.errors import UserError
from diffalign.evaluation.manifest import generation_of


def dpg(
    questions: Path,
    answers: Path | None = None,
    judge: str | None = None,
    images: Path | None = None,
    output: Path | None = None,
    official: bool = False,
    device: str = "auto",
) -> int:
    """Summarise yes-or-no answers: given ones, or those of a vision-language model on images.

    Args:
        questions: dpg_bench.csv of github.com/TencentQQGYLab/ELLA.
        answers: JSONL rows of item_id, tile (which image of the caption), proposition_id and answer; where a judge
            answers they are written here.
        judge: with answers alone, the name of the model that gave them (officially mPLUG-large); with images, the
            model that is asked: http://HOST:PORT/v1 of a server, or a model of transformers by folder or hub name.
        images: folder drawn from the captions, or official grids.
        output: JSON file for the figures.
        official: keep two oddities of the official script: its first question is lost, and categories are counted on
            the last image of a caption only.
        device: where a local judge runs; auto is an accelerator where there is one.
    """
    from diffalign.evaluation.dpg import as_dict, read_answers, read_questions, summarise
    from diffalign.records import sha256_of, write_json, write_jsonl

    if judge is None or answers is None:
        raise UserError("give --answers and the --judge that gave them; or also --images, and the judge is asked")
    asked = read_questions(questions, official)
    if images is not None:
        from diffalign.device import choose_device
        from diffalign.evaluation.asking import ask_dpg, read_tiles
        from diffalign.rewards.vlm import Transcript, load_vlm

        write_jsonl(answers, ask_dpg(read_tiles(images), asked, Transcript(load_vlm(judge, choose_device(device)))))
    summary = summarise(asked, read_answers(answers), official)
    label = "dpg" if judge == "mPLUG-large" and official else f"dpg-like ({judge})"
    sys.stdout.write(
        f"{label}: {summary.score:.2f} over {len(summary.prompts)} captions, {summary.images} images\n"
        + "".join(f"{name}: {value:.2f}\n" for name, value in summary.broad.items())
    )
    if output is not None:
        record = {"benchmark": label, "judge": judge, "official": official, "questions_sha256": sha256_of(questions)}
        generation = None if images is None else generation_of(images)
        write_json(
            output, {**record, "answers_sha256": sha256_of(answers), "generation": generation, **as_dict(summary)}
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(dpg, as_positional=False)))
