"""DPO with all of TRL's losses."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from diffalign.strategies.base import LossOutput
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
    constants = {name: case.params[name] for name in PARAMS if name in case.params}
    if not TRL_SMOOTHED.intersection(constants["loss_type"]):
        constants.pop("label_smoothing", None)
    strategy = DPO(DPOConfig(**constants))
    policy, output = _on_pairs(case, strategy, slice(None))
    chosen, rejected = torch.autograd.grad(output.loss, policy)
    alone = [_on_pairs(case, strategy, slice(row, row + 1))[1].loss for row in range(len(chosen))]
    reported = {name: output.metrics[name].mean() for name in REPORTED}
    return {
        "loss": output.loss,
        "grad_policy_chosen": chosen,
        "grad_policy_rejected": rejected,
        "losses_per_pair": torch.stack(alone),
        **reported,
    }


def _on_pairs(case: GoldenCase, strategy: DPO, rows: slice) -> tuple[list[Tensor], LossOutput]:
    policy, reference, mask = (
        [case.tensor(name)[rows] for name in names]
        for names in (
            ("policy_chosen", "policy_rejected"),
            ("ref_chosen", "ref_rejected"),
            ("chosen_mask", "rejected_mask"),
        )
    )
    leaves = [values.requires_grad_() for values in policy]
    return leaves, on_tokens(strategy, stacked(*leaves), stacked(*mask), stacked(*reference))
