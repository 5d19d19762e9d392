"""LAION aesthetic rating of images: ``python eval/aesthetic.py IMAGES --rewards aesthetic@HEAD [--prompts FILE]``."""

from __future__ import annotations

import sys

from diffalign.cli.main import run_command
from diffalign.cli.score import score_command

if __name__ == "__main__":
    raise SystemExit(run_command(lambda: score_command(sys.argv[1:], "aesthetic", "eval/aesthetic.py")))
