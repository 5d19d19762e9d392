"""Files of text and of results: written whole or not at all, read with an error that names the line, hashed."""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from diffalign.errors import UserError


class _YamlLoader(yaml.SafeLoader):
    """Reads ``3e-4`` and ``1e6`` as numbers, as YAML 1.2 does; to PyYAML alone they are text without a point."""


_YamlLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?([0-9][0-9_]*\.?[0-9_]*|\.[0-9_]+)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


def write_text(path: Path, text: str) -> None:
    """Write text as :func:`write_bytes` writes bytes."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file under a temporary name, then rename it; its folder is made.

    Raises:
        UserError: if it cannot be written.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(data)
        draft.replace(path)
    except OSError as problem:
        draft.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {problem}") from problem


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write an object as indented JSON; numbers that JSON has no word for are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write one JSON object a line."""
    write_text(path, "".join(json.dumps(row, allow_nan=False) + "\n" for row in rows))


def read_text(path: Path) -> str:
    r"""Read UTF-8 with or without a byte order mark (spreadsheets write one); lines end in ``\n``, whatever ended them.

    Raises:
        UserError: if the file is absent or cannot be read, or naming the first line and byte that are not UTF-8.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError as problem:
        raise UserError(f"there is no file {path}") from problem
    except OSError as problem:
        raise UserError(f"cannot read {path}: {problem}") from problem
    data = data.removeprefix(codecs.BOM_UTF8).replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as problem:
        before = data[: problem.start]
        number, column = before.count(b"\n") + 1, problem.start - before.rfind(b"\n")
        raise UserError(
            f"{path}, line {number}: byte {column} of the line (0x{data[problem.start]:02x}) is not UTF-8; save the "
            "file as UTF-8"
        ) from problem


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file, without their ends.

    Only line feeds and carriage returns end a line: ``str.splitlines`` also cuts at characters that captions and JSON
    strings may hold, such as U+2028 and U+0085.

    Raises:
        UserError: as :func:`read_text`.
    """
    return read_text(path).split("\n")


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UserError: if it is absent or damaged.
    """
    text = read_text(path)
    try:
        return json.loads(text)
    except ValueError as problem:
        raise UserError(f"{path} is not readable as JSON: {problem}") from problem


def read_yaml(path: Path) -> Any:
    """Read a YAML file.

    Raises:
        UserError: if it is absent or damaged.
    """
    text = read_text(path)
    try:
        return yaml.load(text, Loader=_YamlLoader)
    except yaml.YAMLError as problem:
        raise UserError(f"{path} is not valid YAML: {' '.join(str(problem).split())}") from problem


def read_jsonl(path: Path, required: Collection[str] = ()) -> list[dict[str, Any]]:
    """Read one JSON object a line; empty lines are skipped.

    Args:
        path: the file.
        required: keys that every object must have.

    Raises:
        UserError: if the file is absent or empty, or naming the first line that is no such object.
    """
    rows = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as problem:
            raise UserError(f"{path}, line {number}: no JSON ({problem})") from problem
        missing = [key for key in required if not isinstance(row, Mapping) or key not in row]
        if missing or not isinstance(row, dict):
            raise UserError(f"{path}, line {number}: expected an object with {', '.join(required) or 'keys'}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} is empty: it holds no row")
    return rows


def sha256_of(path: Path) -> str:
    """Hash a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
