"""What judges are asked and how their answers are read: UnifiedReward (arXiv 2503.05236, 2505.03318) and VQAScore.

The wording is our own; the formats of the answers are those that the published models were trained to give. What cannot
be read is NaN, never 0: a judge that rambles must not look like one that dislikes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

VERSION = "1"
"""Of the wordings below; answers to others are not used again."""
AXES = ("Alignment", "Coherence", "Style")
TOP = 5.0
"""Best score of a single picture; the worst is 1."""

POINT = """You see a picture that was generated for this caption:
{caption}

Judge two things: whether everything in the caption is shown as it says, and whether the picture is well made. First
list every element of the caption on a line of its own, as "element (type): 1" if the picture shows it, and as
"element (type): 0" if it does not. Then weigh both things and write on the last line, from 1 (bad) to 5 (perfect):
Final Score: x"""
AXES_POINT = """You see a picture that was generated for this caption:
{caption}

Rate it on three axes from 1 (bad) to 5 (perfect); fractions are allowed. Alignment: does it show what the caption
says? Coherence: is it free of broken shapes and contradictions? Style: is it pleasant to look at? Answer with:
Alignment Score (1-5): x
Coherence Score (1-5): y
Style Score (1-5): z"""
PAIR = """You see two pictures, Image 1 and Image 2, that were generated for this caption:
{caption}

Which shows the caption more faithfully and is better made? Answer with exactly one of these sentences:
Image 1 is better than Image 2.
Image 2 is better than Image 1.
Both images are equally good."""
YES_NO = 'Does this figure show "{caption}"? Please answer yes or no.'
"""VQAScore's question, which its numbers depend on."""

_MARK = r"[\s*_`:=]*"
"""Blanks, markdown and signs between a name and its number."""
_SCALE = r"(?:\(\s*1\s*-\s*5\s*\))?"
_NUMBER = r"(\d+(?:\.\d+)?)(?!\.?\d)"


def final_score(text: str) -> float:
    """Read the last ``Final Score: x``, in [1, 5]; NaN if there is none."""
    return _last_score("final", text)


def axis_scores(text: str) -> dict[str, float]:
    """Read ``Alignment Score (1-5): x`` and so on: axis -> score in [1, 5]; NaN where there is none."""
    return {axis: _last_score(axis, text) for axis in AXES}


def mean_of_axes(text: str, weights: Mapping[str, float] | None = None) -> float:
    """Average the axes, in [1, 5]; NaN if one is missing.

    Args:
        text: the answer.
        weights: axis -> weight; equal by default.
    """
    scores = axis_scores(text)
    weights = weights or dict.fromkeys(AXES, 1.0)
    return sum(weight * scores[axis] for axis, weight in weights.items()) / sum(weights.values())


def pair_verdict(text: str) -> float:
    """Read which of two pictures is better: 1 the first, 0 the second, 1/2 neither, NaN if it does not say.

    Of an answer with reasoning only the last ``<answer>`` block counts.
    """
    if "<think>" in text or "<answer>" in text:
        blocks = re.findall(r"<answer>(.*?)(?:</answer>|$)", text, re.DOTALL)
        text = blocks[-1] if blocks else ""
    sentence = r"image\s*([12])\s+is\s+better|(both\s+images\s+are\s+equally\s+good)"
    found = list(re.finditer(sentence, re.sub(r"[*_`]", "", text), re.IGNORECASE))
    if not found:
        return math.nan
    return 0.5 if found[-1].group(2) else float(found[-1].group(1) == "1")


def pair_shares(text: str) -> float:
    """Read ``Image 1: x`` and ``Image 2: y`` of every axis: the mean share of the first in [0, 1], or NaN.

    Shares are normalised: the numbers of an axis should sum to 1, and often do not.
    """
    first, second = (
        [float(x) for x in re.findall(rf"image\s*{n}{_MARK}{_NUMBER}", text, re.IGNORECASE)] for n in (1, 2)
    )
    pairs = [(a, b) for a, b in zip(first, second, strict=False) if a + b > 0]
    if not pairs or len(first) != len(second):
        return math.nan
    return sum(a / (a + b) for a, b in pairs) / len(pairs)


def _last_score(name: str, text: str) -> float:
    pattern = rf"{name}\s+score{_MARK}{_SCALE}{_MARK}{_NUMBER}"
    found = [float(number) for number in re.findall(pattern, text, re.IGNORECASE)]
    return found[-1] if found and 1 <= found[-1] <= TOP else math.nan
