"""Diffusion-DRO: errors, hinge and gradients."""

from __future__ import annotations

from typing import Any

from torch.autograd import grad

from diffalign.strategies.dro import ranking_hinge
from diffalign.strategies.pair_kernel import squared_errors
from diffalign.strategies.pair_loss import PairErrors
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    images = ("expert", "policy")
    case.known({f"{name}_{image}" for name in ("eps", "pred", "ref_pred") for image in images}, {"margin": None})
    preds = [case.tensor(f"pred_{image}").requires_grad_() for image in images]
    targets = [case.tensor(f"eps_{image}") for image in images]
    errors = PairErrors(
        *(squared_errors(pred, target) for pred, target in zip(preds, targets, strict=True)),
        *(squared_errors(case.tensor(f"ref_pred_{i}"), target) for i, target in zip(images, targets, strict=True)),
    )
    output = ranking_hinge(errors, case.params["margin"])
    gradients = grad(output.loss, preds)
    return {
        "loss": output.loss,
        "per_sample_diff": output.metrics["expert_gap"],
        "loss_expert": errors.err_w,
        "loss_policy": errors.err_l,
        "loss_expert_ref": errors.ref_err_w,
        "loss_policy_ref": errors.ref_err_l,
        "grad_pred_expert": gradients[0],
        "grad_pred_policy": gradients[1],
    }
