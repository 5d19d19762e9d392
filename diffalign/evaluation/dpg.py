"""DPG-Bench (Hu et al., arXiv 2403.05135; TencentQQGYLab/ELLA, Apache-2.0): yes-or-no questions on dense captions.

A question depends on others ("Is the dog brown?" on "Is there a dog?"): where one of those got a no, its own answer
does not count. The official answers come from mPLUG-large; with those of another model, report "dpg-like (model)".
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffalign.errors import UserError
from diffalign.records import read_jsonl

YES = "yes"
_COLUMNS = ("item_id", "proposition_id", "dependency", "tuple")


@dataclass(frozen=True)
class Question:
    """A question on a caption.

    Args:
        number: its id; ids start at 1.
        parents: ids of the questions that it depends on.
        category: for example "entity - whole".
        text: in words; may be empty.
    """

    number: int
    parents: Sequence[int]
    category: str
    text: str = ""

    @property
    def broad_category(self) -> str:
        """Category before the hyphen: global, entity, attribute, relation, other."""
        return self.category.partition("-")[0].strip()


@dataclass(frozen=True)
class DpgSummary:
    """The figures of the benchmark.

    Args:
        score: 100 times the mean over captions.
        prompts: caption -> mean over its images.
        broad, detailed: category -> 100 times the share of yes.
        images: number of images with answers.
    """

    score: float
    prompts: Mapping[str, float]
    broad: Mapping[str, float]
    detailed: Mapping[str, float]
    images: int


def counted(parents: Mapping[int, Sequence[int]], answers: Mapping[int, str]) -> dict[int, int]:
    """Score the answers on one image.

    Args:
        parents: question -> those it depends on; 0 is none.
        answers: question -> answer; exactly "yes" is 1.

    Returns:
        question -> 1, or 0 where it or a question it depends on got another answer. Questions are gone through by
        ascending id, as officially: a child with a smaller id than its parent's does not see the parent's own fall.

    Raises:
        UserError: for a question without an answer.
    """
    if missing := sorted(set(parents) - set(answers)):
        raise UserError(f"no answer to question {missing[0]} ({len(missing)} of {len(parents)} are missing)")
    scores = {number: int(answers[number] == YES) for number in parents}
    for number in sorted(parents):
        if any(scores.get(parent, 1) == 0 for parent in parents[number] if parent):
            scores[number] = 0
    return scores


def image_score(parents: Mapping[int, Sequence[int]], answers: Mapping[int, str]) -> float:
    """Share of questions that count on one image; arguments as of :func:`counted`."""
    return sum(counted(parents, answers).values()) / len(parents)


def category_scores(answers: Sequence[Mapping[int, str]], official: bool = False) -> dict[int, float]:
    """Share of yes to each question of a caption, for the statistics of categories: dependencies are not applied.

    Args:
        answers: of each image of the caption.
        official: count the last image only, as the official script does.
    """
    images = answers[-1:] if official else answers
    return {number: sum(image[number] == YES for image in images) / len(images) for number in answers[-1]}


def summarise(
    questions: Mapping[str, Sequence[Question]],
    answers: Mapping[str, Sequence[Mapping[int, str]]],
    official: bool = False,
) -> DpgSummary:
    """Summarise the benchmark.

    Args:
        questions: caption's id -> its questions.
        answers: caption's id -> answers on each of its images; every caption with questions must be there.
        official: see :func:`category_scores`.

    Raises:
        UserError: for captions or questions without answers.
    """
    if missing := [item for item in questions if not answers.get(item)]:
        raise UserError(f"{len(missing)} of {len(questions)} captions have no answers, first {missing[0]}")
    prompts: dict[str, float] = {}
    broad: dict[str, list[float]] = {}
    detailed: dict[str, list[float]] = {}
    for item, asked in questions.items():
        parents = {question.number: question.parents for question in asked}
        try:
            prompts[item] = sum(image_score(parents, image) for image in answers[item]) / len(answers[item])
        except UserError as problem:
            raise UserError(f"caption {item}: {problem}") from problem
        shares = category_scores(answers[item], official)
        for question in asked:
            broad.setdefault(question.broad_category, []).append(shares[question.number])
            detailed.setdefault(question.category, []).append(shares[question.number])
    return DpgSummary(
        100 * sum(prompts.values()) / len(prompts),
        prompts,
        {name: 100 * sum(values) / len(values) for name, values in broad.items()},
        {name: 100 * sum(values) / len(values) for name, values in detailed.items()},
        sum(len(images) for item, images in answers.items() if item in questions),
    )


def read_questions(path: Path, official: bool = False) -> dict[str, list[Question]]:
    """Read ``dpg_bench.csv``.

    Args:
        path: the file.
        official: leave out the first row, as the official loader does.

    Raises:
        UserError: if it is absent or of another form.
    """
    if not path.is_file():
        raise UserError(f"no questions at {path}; get dpg_bench/dpg_bench.csv of github.com/TencentQQGYLab/ELLA")
    with path.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    if not rows or any(column not in rows[0] for column in _COLUMNS):
        raise UserError(f"{path} needs the columns {', '.join(_COLUMNS)}")
    questions: dict[str, list[Question]] = {}
    for number, row in enumerate(rows[1:] if official else rows, 3 if official else 2):
        try:
            parents = [int(part) for part in row["dependency"].split(",") if int(part)]
            question = Question(
                int(row["proposition_id"]),
                parents,
                row["tuple"].partition("(")[0].strip(),
                row.get("question_natural_language") or "",
            )
        except (ValueError, AttributeError) as problem:
            raise UserError(f"{path}, line {number}: {problem}") from problem
        questions.setdefault(row["item_id"], []).append(question)
    return questions


def read_answers(path: Path) -> dict[str, list[dict[int, str]]]:
    """Read answers: JSONL rows of ``item_id``, ``tile`` (which image), ``proposition_id``, ``answer``.

    Raises:
        UserError: if the file is absent or of another form, or a question is answered twice.
    """
    items: dict[str, dict[int, dict[int, str]]] = {}
    for row in read_jsonl(path, ("item_id", "tile", "proposition_id", "answer")):
        tile = items.setdefault(str(row["item_id"]), {}).setdefault(int(row["tile"]), {})
        if int(row["proposition_id"]) in tile:
            raise UserError(
                f"{path} answers question {row['proposition_id']} of {row['item_id']}, image {row['tile']} twice"
            )
        tile[int(row["proposition_id"])] = str(row["answer"]).strip().lower()
    return {item: [tiles[number] for number in sorted(tiles)] for item, tiles in items.items()}


def as_dict(summary: DpgSummary) -> dict[str, Any]:
    """Return what summary files hold."""
    return {
        "score": summary.score,
        "prompts": len(summary.prompts),
        "images": summary.images,
        "categories": dict(summary.broad),
        "detailed_categories": dict(summary.detailed),
    }
