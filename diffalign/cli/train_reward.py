"""``diffalign train-reward``: train a preference scorer on pairs."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import ArgumentParser


def train_reward_command(argv: Sequence[str], prog: str = "diffalign train-reward") -> int:
    """Train, then say where the scorer lies and how often it is right.

    Args:
        argv: the command line.
        prog: name of the command in its help.

    Raises:
        UserError: for options, data or models that will not do.
    """
    from diffalign.cli.quiet import quiet_environment, quiet_libraries
    from diffalign.reward_training.config import RewardTrainingConfig

    quiet_environment()
    parser = ArgumentParser(prog=prog, description="Train a preference scorer on pairs.")
    parser.add_argument("--config", action="config", help="YAML file of options; later options override it")
    parser.add_class_arguments(RewardTrainingConfig, as_group=False)
    values = parser.parse_args(list(argv)).as_dict()
    values.pop("config", None)
    config = RewardTrainingConfig(**values)
    quiet_libraries()
    from diffalign.reward_training.fit import train_reward

    result = train_reward(config)
    lines = ["no decided pair was held out: nothing says how well the scorer does"]
    sys.stdout.write("\n".join(result.held_out.lines() if result.held_out else lines) + "\n")
    sys.stdout.write(f"scorer in {result.folder}\n")
    return 0
