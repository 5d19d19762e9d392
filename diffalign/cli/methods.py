"""``diffalign methods``: the registry as a table, as JSON, or as the pages of the documentation."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Sequence
from dataclasses import fields, is_dataclass

from docstring_parser import parse
from jsonargparse import ArgumentParser
from rich.console import Console
from rich.table import Table

from diffalign.strategies.registry import Method, list_methods
from diffalign.training.config import option_defaults


def needs_of(method: Method) -> str:
    """Say in words what a method needs besides its data."""
    spec = method.strategy.spec
    needs = ["reference"] if spec.needs_reference else []
    if spec.needs_reward:
        needs.append("differentiable reward" if spec.needs_reward == "differentiable" else "reward")
    return ", ".join([*needs, *spec.frozen_policies]) or "nothing"


def record(method: Method) -> dict[str, str]:
    """Return the facts of a method as text."""
    return {
        "name": method.name,
        "modality": method.strategy.spec.modality,
        "family": method.family,
        "data": method.strategy.spec.data.replace("_", " "),
        "needs": needs_of(method),
        "summary": method.summary,
        "paper": method.paper,
        "repository": method.repository,
    }


def table_markdown(methods: Sequence[Method]) -> str:
    """Return the short table of the README."""
    lines = ["| `--method` | data | needs | what it does |", "| --- | --- | --- | --- |"]
    for facts in map(record, methods):
        link = f"[`{facts['name']}`](docs/methods.md#{facts['name']})"
        lines.append(f"| {link} | {facts['data']} | {facts['needs']} | {facts['summary']} |")
    return "\n".join(lines) + "\n"


def page_markdown(methods: Sequence[Method]) -> str:
    """Return ``docs/methods.md``: one section of fixed form a method, by family, made from registry and docstrings."""
    lines = ["# Methods", "", "Made by `diffalign methods --format page`; do not edit.", ""]
    for family in dict.fromkeys(method.family for method in methods):
        lines += [f"## {family.capitalize()}", ""]
        for method in methods:
            if method.family == family:
                lines += section(method)
    return "\n".join(lines).rstrip() + "\n"


def section(method: Method) -> list[str]:
    """Return a method's section: facts, its docstring, its options."""
    facts = record(method)
    module = inspect.getmodule(method.strategy)
    sentence = facts["summary"][:1].upper() + facts["summary"][1:] + "."
    lines = [f"### {method.name}", "", sentence, ""]
    lines += [f"- Paper: {facts['paper']}"]
    lines += [f"- Official code: {facts['repository']}"] if facts["repository"] else []
    lines += [f"- Data: {facts['data']} ({facts['modality']}); needs: {facts['needs']}", ""]
    lines += ["```text", inspect.cleandoc(module.__doc__ or "") if module else "", "```", ""]
    described, defaults = option_texts(method.strategy.Config), option_defaults(method.strategy.Config)
    lines += ["| option | default | meaning |", "| --- | --- | --- |"]
    for f in fields(method.strategy.Config):
        meaning = " ".join(described.get(f.name, "").split()).replace("|", "\\|")
        lines.append(f"| `--{f.name}` | `{defaults[f.name]}` | {meaning} |")
    return [*lines, ""]


def option_texts(config: type) -> dict[str, str]:
    """Return option -> its line in the docstring of the configuration, or of the one that it is inherited from."""
    documents = [parse(owner.__doc__ or "") for owner in reversed(config.__mro__) if is_dataclass(owner)]
    return {param.arg_name: param.description or "" for document in documents for param in document.params}


def methods_command(argv: Sequence[str]) -> int:
    """Print every registered method."""
    parser = ArgumentParser(prog="diffalign methods", description="List every method.")
    formats = {
        "table": None,
        "json": lambda methods: json.dumps([record(m) for m in methods], indent=1) + "\n",
        "readme": table_markdown,
        "page": page_markdown,
    }
    parser.add_argument("--format", choices=list(formats), default="table", help="how to print them")
    chosen = formats[parser.parse_args(list(argv)).format]
    methods = list_methods()
    if chosen is not None:
        sys.stdout.write(chosen(methods))
        return 0
    console = Console()
    columns = ["name", "data", "needs", "summary"]
    if console.width >= 140:
        columns += ["paper"]
    table = Table(*("method" if c == "name" else c for c in columns), title="methods")
    table.columns[0].no_wrap = True
    for facts in map(record, methods):
        table.add_row(*(facts[c] for c in columns))
    console.print(table)
    return 0
