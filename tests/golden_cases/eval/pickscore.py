"""PickScore's training objective and its accuracy with ties."""

from __future__ import annotations

from typing import Any

import torch

from diffalign.rewards.objective import caption_weights, in_batch_cross_entropy, pair_logits, preference_cross_entropy
from diffalign.rewards.ranking import accuracy_with_ties, best_threshold
from tests.golden_cases.base import GoldenCase

FEATURES = ("text_features", "image_0_features", "image_1_features")


def run(case: GoldenCase) -> dict[str, Any]:
    return _accuracy(case) if "thresholds" in case.params else _objective(case)


def _accuracy(case: GoldenCase) -> dict[str, Any]:
    case.known({"label_0", "prob_pairs"}, {"thresholds": None})
    pairs, labels, thresholds = case.tensor("prob_pairs"), case.tensor("label_0"), case.params["thresholds"]
    return {
        "accuracy": [accuracy_with_ties(pairs, labels, threshold) for threshold in thresholds],
        "best_threshold": best_threshold(pairs, labels, thresholds),
    }


def _objective(case: GoldenCase) -> dict[str, Any]:
    known = {*FEATURES, "label_0", "num_examples_per_prompt"}
    case.known(known, {"logit_scale_exp": None, "in_batch_negatives": {True, False}})
    features = [case.tensor(name).requires_grad_() for name in FEATURES]
    labels, scale = case.tensor("label_0"), case.params["logit_scale_exp"]
    weights = caption_weights(case.tensor("num_examples_per_prompt"))
    logits = pair_logits(*features, scale)
    if case.params["in_batch_negatives"]:
        loss = in_batch_cross_entropy(*features, labels, scale, weights)
    else:
        loss = preference_cross_entropy(logits, labels, weights)
    gradients = torch.autograd.grad(loss, features)
    probabilities = logits.softmax(-1)
    return {
        "loss": loss,
        "prob_0": probabilities[:, 0],
        "prob_1": probabilities[:, 1],
        **dict(zip(("grad_text", "grad_image_0", "grad_image_1"), gradients, strict=True)),
    }
