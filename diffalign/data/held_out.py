"""Captions of a data set that are kept out of training, so that a run can be judged by them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from diffalign.data.schema import Example, ExampleSet, HeldOut, StreamSet
from diffalign.diffusion.random import derive_seed
from diffalign.errors import UserError


def same_caption(caption: str) -> str:
    """Return what captions have in common that differ in case and spacing only."""
    return " ".join(caption.casefold().split())


def hold_out(dataset: ExampleSet[Example] | StreamSet, count: int) -> ExampleSet[Example] | StreamSet:
    """Take captions out of a data set, with all examples that show one of them; ``held_out`` then returns them.

    A caption's text says whether it is among the first to go, whatever the other captions are, in whatever case and
    spacing it is written. A data set that brings held-out captions stays as it is.

    Args:
        dataset: the examples.
        count: how many captions; 0 for none.

    Raises:
        UserError: for a stream, whose captions nobody knows yet, or if nothing is left to train on.
    """
    if not count or getattr(dataset, "held_out", None) is not None:
        return dataset
    if isinstance(dataset, StreamSet):
        raise UserError(
            "--held_out_prompts needs a data set that is not streamed: give captions by --validation_prompts instead"
        )
    described: dict[str, tuple[str, Mapping[str, Any]]] = {}
    for example in dataset.examples:
        caption = example.prompts[0]
        if caption.strip():
            described.setdefault(same_caption(caption), (caption, example.metadata))
    chosen = dict.fromkeys(sorted(described, key=lambda caption: derive_seed("held out", caption))[:count])
    kept = [e for e in dataset.examples if not any(same_caption(c) in chosen for c in (*e.prompts, *e.alternatives))]
    if not kept:
        raise UserError(
            f"--held_out_prompts {count} leaves nothing to train on: {dataset.name} has {len(described)} captions"
        )
    rows = [described[caption] for caption in chosen]

    def held_out(split: str, count: int, seed: int) -> HeldOut:
        return HeldOut(tuple(row[0] for row in rows[:count]), tuple(row[1] for row in rows[:count]), ())

    noted = {f"examples of {len(chosen)} held-out captions": len(dataset.examples) - len(kept)}
    return replace(dataset.with_examples(kept, noted), held_out=held_out)
