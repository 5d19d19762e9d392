"""The ``diffalign`` command and the entry points of the training scripts."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from diffalign.errors import UserError, nearest


def train_command(argv: Sequence[str], modality: str = "image", prog: str = "diffalign train") -> int:
    """Train a model with a method; a run that a signal stops ends in order as well."""
    from diffalign.cli.parser import parse_train
    from diffalign.cli.quiet import quiet_environment, quiet_libraries

    quiet_environment()
    config = parse_train(argv, modality, prog)
    quiet_libraries()
    from diffalign.training.assemble import build_run

    build_run(config).fit()
    return 0


def _train(argv: Sequence[str]) -> int:
    """Train an image model: diffalign train --method NAME [options]."""
    return train_command(argv)


def _train_text(argv: Sequence[str]) -> int:
    """Train a language model: diffalign train-text --method NAME [options]."""
    return train_command(argv, modality="text", prog="diffalign train-text")


def _train_reward(argv: Sequence[str]) -> int:
    """Train a preference scorer: diffalign train-reward --objective pair [options]."""
    from diffalign.cli.train_reward import train_reward_command

    return train_reward_command(argv)


def _methods(argv: Sequence[str]) -> int:
    """List every method with what it needs, its paper and one line."""
    from diffalign.cli.methods import methods_command

    return methods_command(argv)


def _doctor(argv: Sequence[str]) -> int:
    """Say what is installed, what the machine has, and what is missing for which extra."""
    from diffalign.cli.doctor import doctor_command

    return doctor_command(argv)


def _data(argv: Sequence[str]) -> int:
    """Check a data set: diffalign data check SOURCE --kind pairs."""
    from diffalign.cli.data import data_command

    return data_command(argv)


def _score(argv: Sequence[str]) -> int:
    """Score images by rewards: diffalign score IMAGES --rewards pickscore,clip [options]."""
    from diffalign.cli.score import score_command

    return score_command(argv)


def _label(argv: Sequence[str]) -> int:
    """Collect human preferences in a browser: diffalign label serve IMAGES."""
    from diffalign.cli.label import label_command

    return label_command(argv)


def _export(argv: Sequence[str]) -> int:
    """Write an adapter for other programs: diffalign export RUN --format kohya --output FILE."""
    from diffalign.cli.export import export_command

    return export_command(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "train": _train,
    "train-text": _train_text,
    "train-reward": _train_reward,
    "methods": _methods,
    "data": _data,
    "score": _score,
    "label": _label,
    "export": _export,
    "doctor": _doctor,
}


def run_command(command: Callable[[], int]) -> int:
    """Run a command; a user's mistake becomes one message and status 2, an interruption status 130."""
    try:
        return command()
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``diffalign``."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in {"-h", "--help"}:
        sys.stdout.write("usage: diffalign COMMAND [options]\n\ncommands:\n")
        for name, command in COMMANDS.items():
            sys.stdout.write(f"  {name:<12} {(command.__doc__ or '').strip()}\n")
        return 0 if words else 2
    if words[0] == "--version":
        from diffalign import __version__

        sys.stdout.write(f"diffalign {__version__}\n")
        return 0
    if words[0] not in COMMANDS:
        sys.stderr.write(f"error: unknown command {words[0]!r}: {nearest(words[0], COMMANDS)}\n")
        return 2
    return run_command(lambda: COMMANDS[words[0]](words[1:]))


def script(modality: str, prog: str) -> None:
    """Entry point of ``train_scripts/train*.py``."""
    from diffalign.training.launch import start_missing_processes

    start_missing_processes()
    sys.exit(run_command(lambda: train_command(sys.argv[1:], modality, prog)))
