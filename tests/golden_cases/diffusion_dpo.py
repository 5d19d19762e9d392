"""Diffusion-DPO and its supervised switch."""

from __future__ import annotations

import torch
from torch import Tensor

from diffalign.strategies.base import Context
from diffalign.strategies.diffusion_dpo import DiffusionDPO, DiffusionDPOConfig
from diffalign.strategies.heads import accuracy
from diffalign.strategies.pair_kernel import noised_at
from diffalign.strategies.sft import SFT, SFTConfig
from tests.golden_cases.base import GoldenCase, compare
from tests.golden_cases.scripted import SCHEDULE, ScriptedPolicy, discrete_process, on_predictions, scripted_batch

PREDICTIONS = ("policy_pred", "ref_pred", "target")


def run(case: GoldenCase) -> dict[str, object]:
    if "latents" in case.inputs:
        return _noising(case)
    if case.params["method"] == "sft":
        return _supervised(case)
    return _diffusers(case) if "loss_type" in case.params else _official(case)


def _noising(case: GoldenCase) -> dict[str, object]:
    case.known({"latents", "noise", "timesteps"}, SCHEDULE)
    timesteps, noise = case.integers("timesteps"), case.tensor("noise")
    ctx = Context(ScriptedPolicy(lambda *_: noise, discrete_process(case.params)))  # type: ignore[arg-type]
    batch = scripted_batch(case.tensor("latents"))
    if not torch.equal(timesteps, timesteps[: batch.size].repeat(2)):
        raise ValueError(f"the images of a pair share their timestep, yet the case has {timesteps.tolist()}")
    return {"noisy_latents": noised_at(ctx, batch, timesteps[: batch.size], noise).latents}


def _supervised(case: GoldenCase) -> dict[str, object]:
    case.known(PREDICTIONS, {"method": {"sft"}, "beta_dpo": None})
    pred = case.tensor("policy_pred").requires_grad_()
    output, _ = on_predictions(SFT(SFTConfig()), pred, case.tensor("target"), images=1)
    return {"loss": output.loss, "grad_policy_pred": _gradient(output.loss, pred)}


def _official(case: GoldenCase) -> dict[str, object]:
    case.known(PREDICTIONS, {"method": {"dpo"}, "beta_dpo": None})
    strategy = DiffusionDPO(DiffusionDPOConfig(beta=case.params["beta_dpo"]))
    pred = case.tensor("policy_pred").requires_grad_()
    output, terms = on_predictions(strategy, pred, case.tensor("target"), case.tensor("ref_pred"))
    metrics = output.metrics
    return {
        "loss": output.loss,
        "grad_policy_pred": _gradient(output.loss, pred),
        "inside_term": metrics["logit"],
        "model_losses_w": metrics["policy_error_chosen"],
        "model_losses_l": metrics["policy_error_rejected"],
        "ref_losses_w": metrics["reference_error_chosen"],
        "ref_losses_l": metrics["reference_error_rejected"],
        "raw_model_loss": terms.policy.mean(),
        "raw_ref_loss": terms.reference.mean(),
        "implicit_acc": accuracy(metrics["logit"], tie=0.0).mean(),
    }


def _diffusers(case: GoldenCase) -> dict[str, object]:
    case.known(
        PREDICTIONS,
        {
            "method": {"dpo"},
            "loss_type": {"sigmoid", "hinge", "ipo"},
            "convention": {"z = beta*(ref_diff - policy_diff), no factor 0.5"},
            "beta_without_half": None,
            "equivalent_beta_dpo": None,
        },
    )
    half, beta = case.params["beta_without_half"], case.params["equivalent_beta_dpo"]
    compare(2 * half, beta, case.tolerance, "twice beta_without_half")
    strategy = DiffusionDPO(DiffusionDPOConfig(beta=beta, head=case.params["loss_type"]))
    pred = case.tensor("policy_pred").requires_grad_()
    output, _ = on_predictions(strategy, pred, case.tensor("target"), case.tensor("ref_pred"))
    return {
        "loss": output.loss,
        "grad_policy_pred": _gradient(output.loss, pred),
        "logits_without_beta": output.metrics["logit"] / half,
        "implicit_acc": output.metrics["implicit_accuracy"].mean(),
    }


def _gradient(loss: Tensor, of: Tensor) -> Tensor:
    (gradient,) = torch.autograd.grad(loss, of)
    return gradient
