"""The bundled world's held-out captions with its proxy reward and its verifier, as an evaluator."""

from __future__ import annotations

from diffalign.evaluation.evaluator import ImageEvaluator
from diffalign.rewards.base import Reward
from diffalign.rewards.pickscore import PickScore
from diffalign.rewards.verifier import Verifier
from diffalign.world.grammar import Split, prompts

PROXY = "tiny-pickscore"


def world_evaluator(split: Split, count: int, seed: int = 0) -> ImageEvaluator:
    """Build the evaluator of a split.

    Args:
        split: "tune" for choosing hyper-parameters, "test" for reporting.
        count: number of captions.
        seed: draws the captions and their initial noise; other seeds give others.
    """
    records = prompts(split, count, seed)
    rewards: dict[str, Reward] = {PROXY: PickScore.load(PROXY), "verifier": Verifier(), "graded": Verifier(graded=True)}
    return ImageEvaluator(
        prompts=[record.text for record in records],
        metadata=[record.metadata for record in records],
        seeds=[seed * 1_000_003 + index for index in range(count)],
        rewards=rewards,
        primary=PROXY,
    )
