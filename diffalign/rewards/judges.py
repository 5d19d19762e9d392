"""Rewards given by a vision-language model: UnifiedReward's scores, its duels, and VQAScore.

A model is named after ``@``: ``unified_reward@http://localhost:8000/v1``, ``vqascore@FOLDER``. Answers are kept in a
transcript, so that nothing is asked twice and a run that broke off goes on.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
from PIL import Image
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.base import Metadata, Reward, RewardInfo
from diffalign.rewards.judge_formats import (
    AXES_POINT,
    PAIR,
    POINT,
    TOP,
    VERSION,
    YES_NO,
    final_score,
    mean_of_axes,
    pair_verdict,
)
from diffalign.rewards.registry import LoadOptions, register
from diffalign.rewards.transforms import duel_win_rates, rows_by_caption
from diffalign.rewards.vlm import Answer, Question, Transcript, load_vlm, to_pictures


class JudgeReward(Reward):
    """A reward that asks; a subclass says what.

    Args:
        transcript: the model with its record.
        info: what the number means.

    Attributes:
        answers: scores, or verdicts of duels, so far.
        unread: those that could not be read. Such a score is NaN; such a duel is a tie.
    """

    def __init__(self, transcript: Transcript, info: RewardInfo) -> None:
        self.transcript, self.info = transcript, info
        self.answers = self.unread = 0

    def shares(self) -> Mapping[str, tuple[int, int]]:
        """Return the answers that could not be read, of all."""
        return {"unread_answers": (self.unread, self.answers)}

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Score images (batch, 3, height, width) in [0, 1]; see :meth:`score_pictures`."""
        return self.score_pictures(to_pictures(images), prompts).to(images.device)

    @abstractmethod
    def score_pictures(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Score pictures of any sizes, (batch,); NaN, counted, where an answer cannot be read.

        Raises:
            UserError: if the model does not answer; answers so far are kept.
        """

    def _counted(self, scores: Sequence[float]) -> Tensor:
        self.answers += len(scores)
        self.unread += sum(math.isnan(score) for score in scores)
        return torch.tensor(scores, dtype=torch.float32)


class PointJudge(JudgeReward):
    """UnifiedReward's score of one picture, as a share of the best.

    Args:
        transcript: the model with its record.
        wording: the question, with the place of the caption.
        read: from an answer to a score in [1, 5], or NaN.
        name: reported name.
    """

    def __init__(self, transcript: Transcript, wording: str, read: Callable[[str], float], name: str) -> None:
        unit = f"share of the best score, judged by {transcript.model.name}"
        super().__init__(transcript, RewardInfo(name, unit, (1 / TOP, 1.0), False, licence="of the model"))
        self.wording, self.read = wording, read

    def score_pictures(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Return scores over 5, (batch,)."""
        template = f"{self.info.name}/{VERSION}"
        answers = self.transcript.ask(
            [
                Question([picture], self.wording.format(caption=prompt), template=template)
                for picture, prompt in zip(pictures, prompts, strict=True)
            ]
        )
        return self._counted([self.read(answer.text) / TOP for answer in answers])


class PairJudge(JudgeReward):
    """Share of duels a picture wins against the others of its caption in the batch, both orders asked of each.

    A judge may favour a place, so that a duel is won only if both orders say so; all else is a tie, half a win.

    Args:
        transcript: the model with its record.
    """

    def __init__(self, transcript: Transcript) -> None:
        unit = f"share of duels won, judged by {transcript.model.name}"
        super().__init__(transcript, RewardInfo("unified_reward_pair", unit, (0.0, 1.0), False, licence="of the model"))

    def compare(self, first: Sequence[Image.Image], second: Sequence[Image.Image], prompts: Sequence[str]) -> Tensor:
        """Judge pairs: 1 the first is better, 0 the second, 1/2 neither or a contradiction, NaN if unread, (pairs,)."""
        questions = [
            Question(pair, PAIR.format(caption=prompt), template=f"pair/{VERSION}")
            for a, b, prompt in zip(first, second, prompts, strict=True)
            for pair in ([a, b], [b, a])
        ]
        verdicts = [pair_verdict(answer.text) for answer in self.transcript.ask(questions)]
        return self._counted([consistent(a, b) for a, b in zip(verdicts[::2], verdicts[1::2], strict=True)])

    def score_pictures(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Return shares of duels won, (batch,); 1/2 for a picture alone with its caption."""
        duels = [(rows[i], rows[j]) for rows in rows_by_caption(prompts) for i in range(len(rows)) for j in range(i)]
        left, right = ([pictures[duel[side]] for duel in duels] for side in (0, 1))
        outcomes = self.compare(left, right, [prompts[i] for i, _ in duels])
        return duel_win_rates(torch.tensor(duels, dtype=torch.long).reshape(-1, 2), outcomes, len(pictures))


def consistent(straight: float, swapped: float) -> float:
    """Join the verdicts on a pair and on the pair swapped: what both say, else 1/2; NaN if either is."""
    if math.isnan(straight) or math.isnan(swapped):
        return math.nan
    return straight if straight == 1 - swapped else 0.5


class VqaScore(JudgeReward):
    """VQAScore (Lin et al., arXiv 2404.01291): the probability of "Yes" when asked whether a picture shows its caption.

    Args:
        transcript: the model with its record.
        normalised: divide by the probability of yes or no.
    """

    def __init__(self, transcript: Transcript, normalised: bool = False) -> None:
        unit = f"probability of yes, of {transcript.model.name}"
        super().__init__(transcript, RewardInfo("vqascore", unit, (0.0, 1.0), False, licence="of the model"))
        self.normalised = normalised

    def score_pictures(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Return probabilities, (batch,)."""
        words = ("Yes", "No")
        questions = [
            Question([picture], YES_NO.format(caption=prompt), words, f"vqascore/{VERSION}")
            for picture, prompt in zip(pictures, prompts, strict=True)
        ]
        return self._counted([self._probability(answer) for answer in self.transcript.ask(questions)])

    def _probability(self, answer: Answer) -> float:
        yes, no = answer.words["Yes"], answer.words["No"]
        if not self.normalised:
            return yes
        return yes / (yes + no) if yes + no > 0 else math.nan


def _transcript(name: str, options: LoadOptions) -> Transcript:
    if options.source is None:
        raise UserError(
            f"the reward {name!r} needs a vision-language model: write '{name}@http://HOST:PORT/v1' for a server, or "
            f"'{name}@FOLDER' for a model of transformers"
        )
    return Transcript(load_vlm(options.source, options.device, options.dtype))


@register(
    "unified_reward", summary="score of 1 to 5 by a vision-language judge, over 5", paper="arXiv 2503.05236", large=True
)
def _load_point(options: LoadOptions) -> Reward:
    return PointJudge(_transcript("unified_reward", options), POINT, final_score, "unified_reward")


@register(
    "unified_reward_axes",
    summary="alignment, coherence and style by a judge, their mean",
    paper="arXiv 2503.05236",
    large=True,
)
def _load_axes(options: LoadOptions) -> Reward:
    return PointJudge(_transcript("unified_reward_axes", options), AXES_POINT, mean_of_axes, "unified_reward_axes")


@register(
    "unified_reward_pair",
    summary="share of duels won before a judge, both orders",
    paper="arXiv 2503.05236",
    large=True,
)
def _load_pair(options: LoadOptions) -> Reward:
    return PairJudge(_transcript("unified_reward_pair", options))


@register(
    "vqascore",
    summary="probability that a model says the picture shows the caption",
    paper="arXiv 2404.01291",
    large=True,
)
def _load_vqa(options: LoadOptions) -> Reward:
    return VqaScore(_transcript("vqascore", options))
