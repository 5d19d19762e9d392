"""DPO with all of TRL's losses."""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from diffalign.strategies.base import LossOutput
from diffalign.text.losses import TextHead
from diffalign.text.strategies.dpo import DPO, DPOConfig
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.llm.tokens import on_tokens

INPUTS = {"policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected", "chosen_mask", "rejected_mask"}
PARAMS = {
    "beta": None,
    "loss_type": get_args(TextHead),
    "loss_weights": None,
    "label_smoothing": None,
    "discopop_tau": None,
}
REPORTED = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")


def run(case: GoldenCase) -> dict[str, object]:
    case.known(INPUTS, PARAMS)
    strategy = DPO(DPOConfig(**{name: case.params[name] for name in PARAMS if name in case.params}))
    policy, output = _on_pairs(case, strategy, slice(None))
    (gradient,) = torch.autograd.grad(output.loss, policy)
    chosen, rejected = gradient.chunk(2)
    alone = [_on_pairs(case, strategy, slice(row, row + 1))[1].loss for row in range(len(chosen))]
    reported = {name: output.metrics[name].mean() for name in REPORTED}
    return {
        "loss": output.loss,
        "grad_policy_chosen": chosen,
        "grad_policy_rejected": rejected,
        "losses_per_pair": torch.stack(alone),
        **reported,
    }


def _on_pairs(case: GoldenCase, strategy: DPO, rows: slice) -> tuple[Tensor, LossOutput]:
    both = {
        name: torch.cat([case.tensor(first)[rows], case.tensor(second)[rows]])
        for name, first, second in (
            ("policy", "policy_chosen", "policy_rejected"),
            ("reference", "ref_chosen", "ref_rejected"),
            ("mask", "chosen_mask", "rejected_mask"),
        )
    }
    policy = both["policy"].requires_grad_()
    return policy, on_tokens(strategy, policy, both["mask"], both["reference"])
