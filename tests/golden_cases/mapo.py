"""MaPO: errors, margin term, loss and gradients."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from diffalign.strategies.mapo import MaPO, MaPOConfig
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.scripted import on_predictions


def run(case: GoldenCase) -> dict[str, object]:
    case.known(
        {"model_pred_w", "model_pred_l", "target_w", "target_l"},
        {"beta_mapo": None, "snr_value": None, "num_train_timesteps": None},
    )
    config = MaPOConfig(
        beta=case.params["beta_mapo"],
        snr_value=case.params["snr_value"],
        margin_scale=case.params["num_train_timesteps"],
    )
    preds = [case.tensor(key).requires_grad_() for key in ("model_pred_w", "model_pred_l")]
    target = torch.cat([case.tensor("target_w"), case.tensor("target_l")])
    output, _ = on_predictions(MaPO(config), torch.cat(preds), target)
    grad_w, grad_l = torch.autograd.grad(output.loss, preds)
    return {
        "loss": output.loss,
        "mse_w": output.metrics["policy_error_chosen"],
        "mse_l": output.metrics["policy_error_rejected"],
        "beta_times_logsigmoid": config.beta * F.logsigmoid(output.metrics["logit"]),
        "grad_model_pred_w": grad_w,
        "grad_model_pred_l": grad_l,
    }
