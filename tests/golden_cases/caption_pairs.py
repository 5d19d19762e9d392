"""What the files of DCPO and TDPO expect: errors of both rows of a pair, logit, loss, gradient."""

from __future__ import annotations

import torch

from diffalign.strategies.base import Strategy
from diffalign.strategies.heads import accuracy
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.scripted import on_predictions


def caption_pair_values(strategy: Strategy, case: GoldenCase) -> dict[str, object]:
    """Evaluate a pairwise strategy on the case's predictions."""
    pred = case.tensor("policy_pred").requires_grad_()
    output, _ = on_predictions(strategy, pred, case.tensor("target"), case.tensor("ref_pred"))
    (gradient,) = torch.autograd.grad(output.loss, pred)
    return {
        "policy_error_win": output.metrics["policy_error_chosen"],
        "policy_error_lose": output.metrics["policy_error_rejected"],
        "ref_error_win": output.metrics["reference_error_chosen"],
        "ref_error_lose": output.metrics["reference_error_rejected"],
        "z": output.metrics["logit"],
        "loss": output.loss,
        "implicit_acc": accuracy(output.metrics["logit"], tie=0.0).mean(),
        "grad_policy_pred": gradient,
    }
