"""The training command line: flat typed options, YAML plus overrides, help for the chosen method."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, Namespace

from diffalign.errors import UserError, nearest, unknown
from diffalign.strategies.registry import Method, get_method, list_methods, load_method_file
from diffalign.training.config import GROUPS, TrainConfig
from diffalign.training.presets import read_options
from diffalign.training.resolve import DECIDING, resolve_defaults

MAIN_OPTIONS = (
    "method", "config", "print_config", "pretrained_model_name_or_path", "preset", "dataset_name", "output_dir",
    "max_train_steps", "learning_rate", "global_batch_pairs", "train_batch_size", "rank", "mixed_precision",
    "resume_from_checkpoint", "report_to", "seed",
)  # fmt: skip


class TrainParser(ArgumentParser):
    """Answers mistakes with one line and the nearest known option."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        known = [s.lstrip("-") for action in self._actions for s in action.option_strings]
        hints = [nearest(name, known) for name in re.findall(r"--([\w-]+)", message) if name not in known]
        message = " ".join(message.split())
        sys.stderr.write(f"{self.prog}: error: {message}{' - ' + hints[0] if hints else ''}\n")
        sys.stderr.write(f"try: {self.prog} --method NAME --help\n")
        sys.exit(2)


def build_parser(method: Method, said: Mapping[str, Any], prog: str) -> TrainParser:
    """Build the parser of a method: its own options first, then those of every run, with the preset's defaults.

    Args:
        method: the method.
        said: what the user says of the options that decide the defaults of others.
        prog: the program's name in messages.
    """
    about = f"{method.name}: {method.summary}. {method.paper}."
    parser = TrainParser(prog=prog, description=about, allow_abbrev=False)
    parser.add_argument(
        "--method", type=str, default=method.name, help="name of the method; `diffalign methods` lists them"
    )
    parser.add_argument("--method_file", type=str, default=None, help="Python file that registers a method of your own")
    parser.add_argument("--config", action="config", help="YAML file of options; later options override it")
    groups: dict[str, type] = {f"options of {method.name}": method.strategy.Config, **GROUPS}
    for title, group in groups.items():
        parser.add_class_arguments(group, as_group=True)
        parser._action_groups[-1].title = title if title not in GROUPS else f"{title} options"
    parser.set_defaults(resolve_defaults(method.name, said.get("pretrained_model_name_or_path"), said))
    return parser


def parse_train(argv: Sequence[str], modality: str, prog: str) -> TrainConfig:
    """Turn a command line into a configuration.

    Args:
        argv: arguments without the program's name.
        modality: "image" or "text": whose methods the command offers.
        prog: the program's name in messages.

    Raises:
        UserError: for unknown methods and contradictory options. Exits with 2 on unknown or ill-typed ones.
    """
    peeked = _peek(argv)
    if peeked.get("method_file"):
        load_method_file(Path(peeked["method_file"]))
    if not peeked.get("method"):
        if not argv or {"-h", "--help"} & set(argv):
            sys.stdout.write(overview(modality, prog))
            sys.exit(0 if argv else 2)
        names = ", ".join(m.name for m in list_methods(modality))
        raise UserError(f"--method is missing; choose one of: {names}")
    method = _method_for(peeked["method"], modality)
    parser = build_parser(method, peeked, prog)
    values = _as_dict(parser.parse_args(_spelled_out(argv, method.strategy.Config)))
    for extra in ("config", "method_file", "method"):
        values.pop(extra, None)
    return TrainConfig.from_flat(method.name, method.strategy.Config, values)


def _method_for(name: str, modality: str) -> Method:
    """Look a method up; one of the other modality, also when its name is mistyped, is refused with its command."""
    own = {method.name for method in list_methods(modality)}
    others = {method.name: method.strategy.spec.modality for method in list_methods() if method.name not in own}
    if name in own:
        return get_method(name)
    meant = name if name in others else next(iter(difflib.get_close_matches(name, [*own, *others], n=1)), None)
    if meant not in others:
        raise unknown("method", name, own)
    command = "train_text.py (diffalign train-text)" if others[meant] == "text" else "train.py (diffalign train)"
    advice = f"{meant!r} is {'a text' if others[meant] == 'text' else 'an image'} method: use {command}"
    if name == meant:
        raise UserError(advice)
    near = ", ".join(difflib.get_close_matches(name, own))
    raise UserError(f"unknown method {name!r}; {f'nearest here: {near}; ' if near else ''}{advice}")


def overview(modality: str, prog: str) -> str:
    """Help without a method: what there is, the options used most, where to read on."""
    methods = list_methods(modality)
    parser = build_parser(methods[0], {}, prog)
    lines = [f"usage: {prog} --method NAME [options]", "", "methods:"]
    lines += [f"  {m.name:<18} {m.summary}" for m in methods]
    lines += ["", "main options:"]
    described = {a.dest: a for a in parser._actions}
    for name in MAIN_OPTIONS:
        if name in described:
            lines.append(f"  --{name:<32} {str(described[name].help).split(' (type:')[0].splitlines()[0]}")
    lines += [
        "",
        f"all options of a method: {prog} --method NAME --help",
        "the resolved configuration: --print_config",
        "",
    ]
    return "\n".join(lines)


def _peek(argv: Sequence[str]) -> dict[str, Any]:
    """Read what decides the parser itself, from the command line and from a configuration file named on it."""
    wanted = ("method", "method_file", "config", *DECIDING)
    found: dict[str, Any] = {}
    for index, word in enumerate(argv):
        for name in wanted:
            if word.startswith(f"--{name}="):
                found[name] = word.split("=", 1)[1]
            elif word == f"--{name}" and index + 1 < len(argv):
                found[name] = argv[index + 1]
    if "config" in found:
        from_file = read_options(Path(found["config"]))
        found = {**{name: from_file[name] for name in wanted if name in from_file}, **found}
    return found


def _spelled_out(argv: Sequence[str], config_class: type) -> list[str]:
    """Let one value stand for a list of it (``--report_to wandb``), and a bare switch for true (``--dry_run``)."""
    kinds = {f.name: str(f.type) for part in (config_class, *GROUPS.values()) for f in fields(part)}
    words: list[str] = []
    for index, word in enumerate(argv):
        before = argv[index - 1].removeprefix("--") if index and argv[index - 1].startswith("--") else ""
        name, equals, value = word.removeprefix("--").partition("=")
        last = index + 1 == len(argv) or argv[index + 1].startswith("--")
        if not word.startswith("--"):
            words.append(_listed(word) if kinds.get(before, "").startswith("list") else word)
        elif equals and kinds.get(name, "").startswith("list"):
            words.append(f"--{name}={_listed(value)}")
        else:
            words += [word, "true"] if kinds.get(name) == "bool" and last else [word]
    return words


def _listed(value: str) -> str:
    return value if value.startswith("[") else json.dumps([value])


def _as_dict(namespace: Namespace) -> dict[str, Any]:
    return dict(namespace.as_dict())
