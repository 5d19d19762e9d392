"""Score images by any set of rewards, --rewards NAME,NAME@SOURCE: ``python eval/score.py IMAGES [--prompts FILE]``."""

from __future__ import annotations

import sys

from diffalign.cli.main import run_command
from diffalign.cli.score import score_command

if __name__ == "__main__":
    raise SystemExit(run_command(lambda: score_command(sys.argv[1:], None, "eval/score.py")))
