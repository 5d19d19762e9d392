"""RankDPO: weights from rewards, loss and gradient from predictions."""

from __future__ import annotations

import torch

from diffalign.strategies.rankdpo import RankDPO, RankDPOConfig, pair_weights, preference_probabilities, ranks
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.scripted import on_predictions

REDUCTION = "; ".join(
    (
        "mean over non-batch dims for each squared error",
        "SUM over ordered pairs of a prompt",
        "mean over prompts",
    )
)


def run(case: GoldenCase) -> dict[str, object]:
    case.known(
        {"model_pred", "ref_pred", "target", "reward_scores"},
        {"beta": None, "reduction": {REDUCTION}, "log": {"natural"}},
    )
    scores = case.tensor("reward_scores").transpose(1, 2)  # stored as (prompt, reward, image)
    pred = case.tensor("model_pred").requires_grad_()
    rows = [value.transpose(0, 1).flatten(0, 1) for value in (pred, case.tensor("target"), case.tensor("ref_pred"))]
    strategy = RankDPO(RankDPOConfig(beta=case.params["beta"]))
    output, _ = on_predictions(strategy, *rows, images=pred.shape[1], fields={"scores": scores})
    (gradient,) = torch.autograd.grad(output.loss, pred)
    phi = preference_probabilities(scores)
    return {
        "preference_probability": phi,
        "rank": ranks(phi),
        "pair_weight": pair_weights(phi),
        "loss": output.loss,
        "grad_model_pred": gradient,
    }
