"""PickScore of images: ``python eval/pickscore.py IMAGES [--prompts FILE]``."""

from __future__ import annotations

import sys

from diffalign.cli.main import run_command
from diffalign.cli.score import score_command

if __name__ == "__main__":
    raise SystemExit(run_command(lambda: score_command(sys.argv[1:], "pickscore", "eval/pickscore.py")))
