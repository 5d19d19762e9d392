"""SimPO; the case gives mean log-probabilities, which are the values of completions of one token."""

from __future__ import annotations

import torch

from diffalign.text.strategies.simpo import SimPO, SimPOConfig
from tests.golden_cases.base import GoldenCase, compare
from tests.golden_cases.llm.tokens import on_tokens

PARAMS = {
    "beta": None,
    "gamma_beta_ratio": None,
    "gamma": None,
    "label_smoothing": None,
    "loss_type": {"sigmoid", "hinge"},
}


def run(case: GoldenCase) -> dict[str, object]:
    case.known({"policy_chosen_logp", "policy_rejected_logp"}, PARAMS)
    params = case.params
    compare(params["beta"] * params["gamma_beta_ratio"], params["gamma"], case.tolerance, "gamma")
    strategy = SimPO(
        SimPOConfig(
            beta=params["beta"],
            gamma_beta_ratio=params["gamma_beta_ratio"],
            head=params.get("loss_type", "sigmoid"),
            # the official hinge ignores smoothing, which the product refuses there
            label_smoothing=0.0 if params.get("loss_type") == "hinge" else params.get("label_smoothing", 0.0),
        )
    )
    means = torch.cat([case.tensor("policy_chosen_logp"), case.tensor("policy_rejected_logp")])
    policy = means[:, None].requires_grad_()
    output = on_tokens(strategy, policy, torch.ones_like(policy))
    (gradient,) = torch.autograd.grad(output.loss, policy)
    chosen, rejected = gradient[:, 0].chunk(2)
    return {
        "losses": output.metrics["loss"],
        "loss": output.loss,
        "chosen_rewards": output.metrics["rewards/chosen"],
        "rejected_rewards": output.metrics["rewards/rejected"],
        "grad_policy_chosen_logp": chosen,
        "grad_policy_rejected_logp": rejected,
    }
