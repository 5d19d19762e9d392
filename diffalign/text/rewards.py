"""Exact reward of the bundled writing task: does the caption say what the request asked for?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.text.writer import END_OF_REQUEST, Meaning, Thing, read_caption, read_request


@dataclass(frozen=True)
class CaptionVerdict:
    """What the parser found.

    Args:
        correct: the caption is well-formed and says exactly what was asked.
        graded: share of satisfied checks in [0, 1]: each object's presence, colour and count, nothing else named, and
            the relation; 0 if the caption is not well-formed.
        reason: the first thing wrong; empty if nothing is.
    """

    correct: bool
    graded: float
    reason: str


def judge_caption(request: str, caption: str) -> CaptionVerdict:
    """Compare a caption with the request that it answers.

    Raises:
        UserError: if the request is none of the bundled task's.
    """
    asked = read_request(request)
    if asked is None:
        raise UserError(
            f"{request!r} is no request of the bundled writer: expected objects of the bundled world, as in "
            f"'red circle , blue star {END_OF_REQUEST}'"
        )
    said = read_caption(caption)
    if said is None:
        return CaptionVerdict(False, 0.0, "the caption is not well-formed")
    checks = _checks(asked, said)
    failed = [what for what, passed in checks if not passed]
    return CaptionVerdict(asked.canonical == said.canonical, 1 - len(failed) / len(checks), (failed or [""])[0])


def caption_rewards(prompts: Sequence[str], completions: Sequence[str]) -> Tensor:
    """Return 1.0 for every correct caption and 0.0 for any other, (B,) float32."""
    pairs = zip(prompts, completions, strict=True)
    return torch.tensor([float(judge_caption(prompt, completion).correct) for prompt, completion in pairs])


def _checks(asked: Meaning, said: Meaning) -> list[tuple[str, bool]]:
    checks: list[tuple[str, bool]] = []
    left = list(said.things)
    for wanted in asked.things:
        found = _match(wanted, left)
        if found is not None:
            left.remove(found)
        checks.append((f"no {wanted.shape} is named", found is not None))
        checks.append((f"the {wanted.shape} has another colour", found is not None and found.color == wanted.color))
        checks.append((f"the {wanted.shape} has another count", found is not None and found.count == wanted.count))
    checks.append(("something else is named", not left))
    if asked.relation or said.relation:
        shapes = [(tuple(t.shape for t in things), relation) for things, relation in (asked.canonical, said.canonical)]
        checks.append(("the relation is another", shapes[0] == shapes[1]))
    return checks


def _match(wanted: Thing, things: Sequence[Thing]) -> Thing | None:
    alike = [thing for thing in things if thing.shape == wanted.shape]
    return max(alike, key=lambda t: (t.color == wanted.color) + (t.count == wanted.count), default=None)
