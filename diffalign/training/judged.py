"""The captions that a run is looked at with: those of its grid, and those that rewards judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from diffalign.data.held_out import same_caption
from diffalign.data.schema import Example, ExampleSet, HeldOut, StreamSet
from diffalign.errors import UserError
from diffalign.evaluation.prompt_sets import EvalPrompt, load_prompts
from diffalign.rewards.base import Reward
from diffalign.training.config import TrainConfig
from diffalign.training.domain import EVALUATION_SEED, EVALUATION_SPLIT

_FILES = (".txt", ".jsonl")
"""How a validation prompt ends that is a file of them."""
Origin = Literal["held_out", "validation"]
"""Captions that are not trained on, or whatever the user has named; metrics of judges begin with it."""


@dataclass(frozen=True)
class LookedAt:
    """Captions of a run's validations.

    Args:
        grid: those of the grid.
        judged: those that rewards judge, with the rewards that judge them besides the watched one; None for none.
        origin: where the judged ones come from.
    """

    grid: tuple[str, ...]
    judged: HeldOut | None = None
    origin: Origin = "held_out"

    def require_descriptions(self, rewards: Mapping[str, Reward]) -> None:
        """Refuse rewards that read a description of each caption where the judged captions have none.

        Raises:
            UserError: naming the reward.
        """
        bare = self.judged is not None and not all(self.judged.metadata)
        readers = [name for name, reward in rewards.items() if reward.info.needs_metadata]
        if bare and readers:
            raise UserError(
                f"the reward {readers[0]} reads a description of each caption, which those that it is to judge lack: "
                "give captions with one (.jsonl with 'prompt' and 'metadata', GenEval's row format), or choose another"
            )

    def trained_on(self, dataset: ExampleSet[Example] | StreamSet) -> int:
        """Count the judged captions that are among those of a data set, as far as that is known."""
        if self.judged is None or self.origin == "held_out" or isinstance(dataset, StreamSet):
            return 0
        trained = {same_caption(prompt) for example in dataset.examples for prompt in example.prompts}
        return sum(same_caption(prompt) in trained for prompt in self.judged.prompts)


def looked_at(config: TrainConfig, dataset: ExampleSet[Example] | StreamSet) -> LookedAt:
    """Choose the captions of a run's validations.

    The grid has those that were asked for, else held-out ones, else the data's own. Rewards judge the held-out ones of
    ``evaluation_prompts``; where there are none, the watched reward judges those that were asked for, else others that
    are held out, but never captions of the data that are trained on.

    Args:
        config: the run.
        dataset: as a domain reads it.

    Raises:
        UserError: if a file of captions cannot be read, or early stopping has nothing to judge.
    """
    run, draw = config.run, getattr(dataset, "held_out", None)
    named = _named(run.validation_prompts)
    unnamed = run.early_stop_prompts if run.early_stop_reward and not named else config.data.held_out_prompts
    wanted = run.evaluation_prompts or unnamed
    held: HeldOut | None = draw(EVALUATION_SPLIT, wanted, EVALUATION_SEED) if draw is not None and wanted else None
    grid = [prompt.text for prompt in named] or list(held.prompts if held else _captions(dataset))
    shown = tuple(grid[: run.num_validation_images])
    if held is not None and run.evaluation_prompts and (held.rewards or run.early_stop_reward):
        return LookedAt(shown, held)
    if not run.early_stop_reward:
        return LookedAt(shown)
    if named:
        first = named[: run.early_stop_prompts]
        texts, metadata = tuple(p.text for p in first), tuple(p.metadata or {} for p in first)
        return LookedAt(shown, HeldOut(texts, metadata, ()), "validation")
    if held is None:
        raise UserError(
            "--early_stop_reward has no captions to judge but those that are trained on: name others by "
            "--validation_prompts (captions, or a file with one a line), or take some out of the data set by "
            f"--held_out_prompts {run.early_stop_prompts}"
        )
    return LookedAt(shown, replace(held, rewards=()))


def _named(given: Sequence[str]) -> list[EvalPrompt]:
    """Return the captions that a user has listed, or put into files."""
    parts = [load_prompts(text).prompts if text.endswith(_FILES) else [EvalPrompt(text)] for text in given]
    return [prompt for part in parts for prompt in part]


def _captions(dataset: ExampleSet[Example] | StreamSet) -> list[str]:
    if isinstance(dataset, StreamSet):
        return []
    return [text for text in dict.fromkeys(text for example in dataset.examples for text in example.prompts) if text]
