"""Captions of benchmarks: from a file, from the hub, generated (GenEval) or drawn (the bundled world)."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from diffalign.errors import UserError, unknown
from diffalign.evaluation.geneval.prompts import as_jsonl, official_rows
from diffalign.records import read_json, read_jsonl, read_lines, read_text
from diffalign.world.grammar import prompts as world_prompts

HPS_STYLES = ("anime", "concept-art", "paintings", "photo")
WORLD_CAPTIONS = 400
ELSEWHERE = {
    "partiprompts": "PartiPrompts.tsv of github.com/google-research/parti",
    "hpsv2": "anime.json, concept-art.json, paintings.json and photo.json, folder 'benchmark' of the hub's data set "
    "zhwang/HPDv2; put them into one folder and give that",
    "drawbench": "data of the Imagen paper (imagen.research.google)",
    "dpg": "dpg_bench/prompts of github.com/TencentQQGYLab/ELLA (one .txt file a caption; give the folder)",
    "t2i_compbench": "examples/dataset/*_val.txt of github.com/Karine-Huang/T2I-CompBench",
    "unigenbench": "data/test_prompts_en.csv of github.com/CodeGoat24/UniGenBench",
}
"""Sets that are not carried along, and where they are published."""
GENERATED = ("geneval", "world")
_COLUMNS = ("prompt", "Prompt", "prompt_en", "caption", "text")


@dataclass(frozen=True)
class EvalPrompt:
    """A caption of a benchmark.

    Args:
        text: the caption.
        metadata: whatever the benchmark says of it.
    """

    text: str
    metadata: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class PromptSet:
    """Captions in the benchmark's order.

    Args:
        name: of the set, or path of its file.
        prompts: the captions.
        sha256: of the file, or of what is generated.
        total: captions before a limit was applied.
    """

    name: str
    prompts: Sequence[EvalPrompt]
    sha256: str
    total: int

    def first(self, limit: int | None) -> PromptSet:
        """Return the set with its first captions only; all of them for None."""
        return self if limit is None else replace(self, prompts=self.prompts[:limit])


def load_prompts(source: str) -> PromptSet:
    """Load captions.

    Args:
        source: "geneval" (the 553 official captions); "world" (held-out captions of the bundled world); a file (.txt
            with one caption a line, .jsonl with "prompt" and "metadata" or GenEval's rows, .json with a list, .csv or
            .tsv with a column of captions); a folder with HPSv2's four lists or with one .txt file a caption; or
            USER/DATASET/FILE on the hub.

    Raises:
        UserError: if there is nothing of that name; for published sets it says where they are.
    """
    if source == "geneval":
        rows = official_rows()
        return _set(source, [EvalPrompt(row["prompt"], row) for row in rows], as_jsonl(rows).encode())
    if source == "world":
        records = world_prompts("test", WORLD_CAPTIONS, seed=0)
        text = as_jsonl([record.metadata for record in records])
        return _set(source, [EvalPrompt(record.text, record.metadata) for record in records], text.encode())
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if not path.is_file():
        if source in ELSEWHERE:
            raise UserError(f"the captions of {source} are not bundled; get {ELSEWHERE[source]}")
        if source.count("/") < 2 or source.startswith(("/", ".", "~")):
            if path.suffix or "/" in source:
                raise UserError(f"there is no prompt file {source}")
            raise unknown("prompt set", source, [*GENERATED, *ELSEWHERE])
        path = _from_hub(source)
    prompts = _from_file(path)
    if not prompts:
        raise UserError(f"{path} holds no captions")
    if empty := [i for i, prompt in enumerate(prompts) if not prompt.text.strip()]:
        raise UserError(f"{path}: caption {empty[0]} is empty")
    return _set(source, prompts, path.read_bytes())


def _set(name: str, prompts: Sequence[EvalPrompt], content: bytes) -> PromptSet:
    return PromptSet(name, prompts, hashlib.sha256(content).hexdigest(), len(prompts))


def _from_hub(source: str) -> Path:
    user, dataset, file = source.split("/", 2)
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(f"{user}/{dataset}", file, repo_type="dataset"))
    except Exception as problem:
        reason = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        raise UserError(
            f"there is no file {source}, and the hub's data set {user}/{dataset} did not give {file} ({reason})"
        ) from problem


def _from_folder(folder: Path) -> PromptSet:
    """HPSv2's lists, or DPG-Bench's one text file a caption, whose name is the caption's id."""
    lists = [folder / f"{style}.json" for style in HPS_STYLES]
    if present := [path for path in lists if path.is_file()]:
        if len(present) < len(lists):
            missing = ", ".join(path.name for path in lists if path not in present)
            raise UserError(f"{folder} lacks {missing} of HPSv2's four lists")
        prompts = [
            EvalPrompt(text, {"style": path.stem, "index": index})
            for path in lists
            for index, text in enumerate(_texts(path))
        ]
        return _set(str(folder), prompts, b"".join(path.read_bytes() for path in lists))
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise UserError(f"no captions in {folder}: expected HPSv2's lists ({lists[0].name}, ...) or .txt files")
    prompts = [EvalPrompt(read_text(path).strip(), {"item_id": path.stem}) for path in files]
    if empty := [path.name for path, prompt in zip(files, prompts, strict=True) if not prompt.text]:
        raise UserError(f"{folder}/{empty[0]} is empty")
    return _set(str(folder), prompts, b"".join(path.read_bytes() for path in files))


def _from_file(path: Path) -> list[EvalPrompt]:
    if path.suffix == ".jsonl":
        return [_from_row(row) for row in read_jsonl(path, ("prompt",))]
    if path.suffix == ".json":
        return [EvalPrompt(text) for text in _texts(path)]
    if path.suffix in (".csv", ".tsv"):
        return _from_table(path)
    return [EvalPrompt(line.strip()) for line in read_lines(path) if line.strip()]


def _from_row(row: Mapping[str, Any]) -> EvalPrompt:
    """A row with "metadata", or one that is its own description, as GenEval's rows are."""
    rest = {key: value for key, value in row.items() if key not in ("prompt", "metadata")}
    metadata = row.get("metadata") or (dict(row) if rest else None)
    return EvalPrompt(str(row["prompt"]), metadata)


def _texts(path: Path) -> list[str]:
    content = read_json(path)
    if not isinstance(content, list) or not all(isinstance(text, str) for text in content):
        raise UserError(f"{path}: expected a list of captions")
    return content


def _from_table(path: Path) -> list[EvalPrompt]:
    rows = list(csv.DictReader(io.StringIO(read_text(path)), delimiter="\t" if path.suffix == ".tsv" else ","))
    column = next((name for name in _COLUMNS if rows and name in rows[0]), None)
    if column is None:
        raise UserError(f"{path} has no column of captions; expected one of {', '.join(_COLUMNS)}")
    return [EvalPrompt(row[column] or "", _table_metadata(row, column)) for row in rows]


def _table_metadata(row: Mapping[str, str], column: str) -> dict[str, Any]:
    """The other columns; those that hold JSON (UniGenBench's) are read."""
    values: dict[str, Any] = {name.lower(): value for name, value in row.items() if name and name != column}
    for name, value in values.items():
        if isinstance(value, str) and value.startswith("{"):
            try:
                values[name] = json.loads(value)
            except ValueError:
                continue  # text that only looks like JSON stays text
    return values
