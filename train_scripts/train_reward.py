"""Train a preference scorer on pairs: ``python train_scripts/train_reward.py --objective pair``.

``--help`` lists the options; ``diffalign train-reward`` is the same.
"""

from __future__ import annotations

import sys

from diffalign.cli.main import run_command
from diffalign.cli.train_reward import train_reward_command

if __name__ == "__main__":
    raise SystemExit(run_command(lambda: train_reward_command(sys.argv[1:], "train_reward.py")))
