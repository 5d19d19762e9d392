"""UniGenBench: ``python eval/unigenbench.py --answers FILE --judge NAME [--images FOLDER]``."""

from __future__ import annotations

import csv
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.errors import UserError
from diffalign.records import read_jsonl, sha256_of, write_json, write_jsonl


def unigenbench(
    answers: Path, judge: str, images: Path | None = None, output: Path | None = None, device: str = "auto"
) -> int:
    """Summarise judgements by dimension: given ones, or those of a vision-language model on images.

    Args:
        answers: .csv or .jsonl, one row an image, with testpoint and result_json as the official script writes them;
            where a judge answers they are written here.
        judge: name of the model that judged; with images, the model that is asked: http://HOST:PORT/v1 of a server, or
            a model of transformers by folder or hub name.
        images: folder drawn from the benchmark's table of captions.
        output: JSON file for the figures.
        device: where a local judge runs; auto is an accelerator where there is one.
    """
    from diffalign.evaluation.unigenbench import as_dict, summarise

    if images is not None:
        from diffalign.device import choose_device
        from diffalign.evaluation.asking import ask_unigenbench
        from diffalign.evaluation.generation import TABLE
        from diffalign.rewards.scoring import read_items
        from diffalign.rewards.vlm import Transcript, load_vlm

        model = Transcript(load_vlm(judge, choose_device(device)))
        write_jsonl(answers, ask_unigenbench(read_items(images / TABLE), model))
    summary = summarise(_rows(answers))
    lines = [
        f"{name.strip()}: {part.accuracy:.4f} ({part.correct} of {part.total})"
        for name, part in summary.primary.items()
    ]
    sys.stdout.write("\n".join([f"unigenbench-like ({judge}): {summary.overall:.4f}", *lines]) + "\n")
    sys.stdout.write(f"{summary.failed} rows without a readable judgement\n")
    if output is not None:
        record = {"benchmark": f"unigenbench-like ({judge})", "judge": judge, "answers_sha256": sha256_of(answers)}
        write_json(output, {**record, **as_dict(summary)})
    return 0


def _rows(path: Path) -> Sequence[Mapping[str, Any]]:
    if path.suffix != ".csv":
        return read_jsonl(path, ("testpoint",))
    if not path.is_file():
        raise UserError(f"there is no file {path}")
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(unigenbench, as_positional=False)))
