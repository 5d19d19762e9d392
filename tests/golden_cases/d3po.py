"""D3PO: who is preferred, clipped log-ratios, loss and gradients of one step."""

from __future__ import annotations

from typing import Any

from torch.autograd import grad

from diffalign.strategies.d3po import clipped_log_ratio, d3po_loss, preference_signs
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    names = {f"{name}_{image}" for name in ("log_prob", "ref_log_prob", "reward") for image in (0, 1)}
    case.known(names, {"beta": None, "eps": None})
    log_probs = [case.tensor(f"log_prob_{image}").requires_grad_() for image in (0, 1)]
    eps = case.params["eps"]
    ratios = [clipped_log_ratio(log_probs[image], case.tensor(f"ref_log_prob_{image}"), eps) for image in (0, 1)]
    signs = preference_signs(case.tensor("reward_0"), case.tensor("reward_1"))
    loss = d3po_loss(ratios[0], ratios[1], signs, case.params["beta"]).loss
    gradients = grad(loss, log_probs)
    return {
        "prefer": signs,
        "loss": loss,
        **{f"grad_log_prob_{image}": gradients[image] for image in (0, 1)},
        **{f"per_sample_clipped_log_ratio_{image}": ratios[image] for image in (0, 1)},
    }
