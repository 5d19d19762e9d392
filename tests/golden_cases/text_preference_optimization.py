"""TDPO (pairs of captions of one image) and TKTO (captions with labels)."""

from __future__ import annotations

import torch

from diffalign.strategies.tdpo import TDPO, TDPOConfig
from diffalign.strategies.tkto import TKTO, TKTOConfig
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.caption_pairs import caption_pair_values
from tests.golden_cases.scripted import on_predictions


def run(case: GoldenCase) -> dict[str, object]:
    return _tkto(case) if "labels" in case.inputs else _tdpo(case)


def _tdpo(case: GoldenCase) -> dict[str, object]:
    case.known({"policy_pred", "ref_pred", "target"}, {"beta": None})
    return caption_pair_values(TDPO(TDPOConfig(beta=case.params["beta"])), case)


def _tkto(case: GoldenCase) -> dict[str, object]:
    case.known(
        {"policy_pred", "ref_pred", "target", "labels"},
        {
            "beta": None,
            "lambda_matched": None,
            "lambda_mismatched": None,
            "utility": {"sigmoid"},
            "offset": {"batch mean, clamped at 0"},
        },
    )
    config = TKTOConfig(
        beta=case.params["beta"],
        weight_liked=case.params["lambda_matched"],
        weight_disliked=case.params["lambda_mismatched"],
    )
    label = case.tensor("labels")
    order = label.argsort(descending=True, stable=True)  # matching captions first, as in the product's batches
    if label.sum() * 2 != len(label):
        raise ValueError("a TKTO case has as many mismatched captions as matching ones")
    back = order.argsort()
    pred, target, ref_pred = (case.tensor(name)[order] for name in ("policy_pred", "target", "ref_pred"))
    strategy = TKTO(config)
    output, terms = on_predictions(strategy, pred.requires_grad_(), target, ref_pred)
    (gradient,) = torch.autograd.grad(output.loss, pred)
    logits = strategy.objective.logits(terms, output.metrics["reference_point"])
    return {
        "reference_point": output.metrics["reference_point"],
        "z": logits[back, 0],
        "loss": output.loss,
        "grad_policy_pred": gradient[back],
    }
