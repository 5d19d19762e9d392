"""PRDP: losses of all pairs of one caption, their mean and its gradient."""

from __future__ import annotations

from typing import Any

from torch.autograd import grad

from diffalign.strategies.prdp import reward_difference_losses
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    case.known(
        {"log_probs", "log_probs_old", "log_probs_ref", "rewards"},
        {"clip_range": None, "kl_weight": None},
    )
    log_probs = case.tensor("log_probs").requires_grad_()
    pairs = reward_difference_losses(
        log_probs,
        case.tensor("log_probs_old"),
        case.tensor("log_probs_ref"),
        case.tensor("rewards"),
        beta=case.params["kl_weight"],
        eps=case.params["clip_range"],
    )
    return {
        "loss": pairs.loss,
        "pair_loss_matrix": pairs.losses,
        "n_pairs_used": pairs.counted.sum(),
        "grad_loss_wrt_log_probs": grad(pairs.loss, log_probs)[0],
    }
