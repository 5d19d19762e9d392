"""Check scorers against known scores: ``python eval/self_check.py --fixtures FILE``."""

from __future__ import annotations

import sys
from pathlib import Path

from jsonargparse import auto_cli

from diffalign.cli.main import run_command
from diffalign.errors import UserError


def self_check(fixtures: Path, device: str = "auto") -> int:
    """Score pictures whose scores are known; ends with status 2 where one differs.

    Args:
        fixtures: JSONL rows of image, prompt, reward, score and tolerance, for example from a scorer's own repository.
        device: where networks run; auto is an accelerator where there is one.
    """
    from diffalign.device import choose_device
    from diffalign.rewards.self_check import check, read_fixtures

    checked = check(read_fixtures(fixtures), choose_device(device))
    sys.stdout.write("".join(f"{row}\n" for row in checked))
    if wrong := [row for row in checked if not row.agrees]:
        raise UserError(f"{len(wrong)} of {len(checked)} scores differ from what is known, first {wrong[0]}")
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(lambda: auto_cli(self_check, as_positional=False)))
