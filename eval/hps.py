"""HPSv2.1 of images: ``python eval/hps.py IMAGES [--prompts FILE]``."""

from __future__ import annotations

import sys

from diffalign.cli.main import run_command
from diffalign.cli.score import score_command

if __name__ == "__main__":
    raise SystemExit(run_command(lambda: score_command(sys.argv[1:], "hpsv2.1", "eval/hps.py")))
