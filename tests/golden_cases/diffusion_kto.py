"""Diffusion-KTO: utilities, reference points, loss and gradient."""

from __future__ import annotations

import torch

from diffalign.strategies.diffusion_kto import DiffusionKTO, DiffusionKTOConfig
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.scripted import on_predictions

UTILITIES = {"sigmoid": "sigmoid", "loss_averse": "loss_averse", "risk_seeking_3": "risk_seeking"}
OFFSETS = {"none": "batch_mean", "sigmoid": "class_means"}


def run(case: GoldenCase) -> dict[str, object]:
    case.known(
        {"model_pred", "ref_pred", "target", "labels"},
        {"beta": None, "utility": UTILITIES.keys(), "offset": OFFSETS.keys(), "lambda_d": None, "lambda_u": None},
    )
    config = DiffusionKTOConfig(
        beta=case.params["beta"],
        utility=UTILITIES[case.params["utility"]],  # type: ignore[arg-type]
        reference_point=OFFSETS[case.params["offset"]],  # type: ignore[arg-type]
        reference_scope="micro_batch",
        weight_liked=case.params["lambda_d"],
        weight_disliked=case.params["lambda_u"],
    )
    pred, fields = case.tensor("model_pred").requires_grad_(), {"label": case.tensor("labels")}
    target, ref_pred = case.tensor("target"), case.tensor("ref_pred")
    output, _ = on_predictions(DiffusionKTO(config), pred, target, ref_pred, images=1, fields=fields)
    (gradient,) = torch.autograd.grad(output.loss, pred)
    return {
        "loss": output.loss,
        "mse": output.metrics["policy_error"],
        "ref_mse": output.metrics["reference_error"],
        "reference_point": output.metrics["reference_point"],
        "grad_model_pred": gradient,
    }
