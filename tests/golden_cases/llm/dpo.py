"""DPO with all of TRL's losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from diffalign.text.losses import TextHead
from diffalign.text.strategies.dpo import DPO, DPOConfig
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.llm.tokens import on_tokens, stacked

INPUTS = {"policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "chosen_mask", "rejected_mask"}
PARAMS = {
    "beta": None,
    "loss_type": get_args(TextHead),
    "loss_weights": None,
    "label_smoothing": None,
    "discopop_tau": None,
}
TRL_SMOOTHED = {"robust", "exo_pair", "aot", "aot_unpaired"}
"""Losses that know label smoothing in TRL; its others ignore it, where the product smooths or refuses."""
REPORTED = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def run(case: GoldenCase) -> dict[str, object]:
    case.known(INPUTS, PARAMS)
    strategies = _strategies(case)
    policy, loss, metrics = _on_pairs(case, strategies, slice(None))
    chosen, rejected = torch.autograd.grad(loss, policy)
    alone = [_on_pairs(case, strategies, slice(row, row + 1))[1] for row in range(len(chosen))]
    reported = {name: metrics[name].mean() for name in REPORTED}
    return {
        "loss": loss,
        "grad_policy_chosen": chosen,
        "grad_policy_rejected": rejected,
        "losses_per_pair": torch.stack(alone),
        **reported,
    }


def _strategies(case: GoldenCase) -> list[DPO]:
    """The case's mixture, as one strategy for what TRL smooths and one for the rest, where there are both."""
    constants = {name: case.params[name] for name in PARAMS if name in case.params}
    heads, smoothing = constants.pop("loss_type"), constants.pop("label_smoothing", 0.0)
    weights = constants.pop("loss_weights", [1.0] * len(heads))
    parts: dict[float, list[tuple[Any, float]]] = {}
    for head, weight in zip(heads, weights, strict=True):
        parts.setdefault(smoothing if head in TRL_SMOOTHED else 0.0, []).append((head, weight))
    return [
        DPO(
            DPOConfig(
                loss_type=[head for head, _ in part],
                loss_weights=[weight for _, weight in part],
                label_smoothing=smoothed,
                **constants,
            )
        )
        for smoothed, part in parts.items()
    ]


def _on_pairs(
    case: GoldenCase, strategies: Sequence[DPO], rows: slice
) -> tuple[list[Tensor], Tensor, Mapping[str, Tensor]]:
    """Leaves, the sum of the losses, and the metrics, which do not depend on the loss."""
    policy, reference, mask = (
        [case.tensor(name)[rows] for name in names]
        for names in (
            ("policy_chosen", "policy_rejected"),
            ("ref_chosen", "ref_rejected"),
            ("chosen_mask", "rejected_mask"),
        )
    )
    leaves = [values.requires_grad_() for values in policy]
    outputs = [on_tokens(strategy, stacked(*leaves), stacked(*mask), stacked(*reference)) for strategy in strategies]
    return leaves, torch.stack([output.loss for output in outputs]).sum(), outputs[0].metrics
