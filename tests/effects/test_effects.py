"""Short runs that must make samples better, in the ordinary test command: the default method, and one for text.

The whole table, every method with several training seeds and hundreds of held-out captions, is ``eval/leaderboard.py``.
"""

from __future__ import annotations

from pathlib import Path

import diffalign

CAPTIONS = 160


def test_the_readmes_method_wins_against_the_start(tmp_path: Path) -> None:
    summary = diffalign.train(
        method="inpo",
        output_dir=str(tmp_path / "run"),
        evaluation_prompts=CAPTIONS,
        num_validation_images=0,
    ).summary
    assert summary["captions"] == CAPTIONS
    assert summary["win_rate"]["value"] > 0.5
    verifier = summary["rewards"]["verifier"]
    assert verifier["after"] > verifier["before"] - 0.05, "the proxy was gamed"


def test_a_language_model_writes_better_captions(tmp_path: Path) -> None:
    summary = diffalign.train(method="simpo", output_dir=str(tmp_path / "run"), evaluation_prompts=CAPTIONS).summary
    assert summary["reward_after"] > summary["reward_before"] + 0.1
