"""SePPO: sign of the anchor, loss and gradients."""

from __future__ import annotations

from typing import Any

from torch.autograd import grad

from diffalign.strategies.pair_kernel import squared_errors
from diffalign.strategies.pair_loss import PairConfig, PairErrors, PairObjective
from diffalign.strategies.seppo import anchor_sign, anchored_margin
from tests.golden_cases.base import GoldenCase


def run(case: GoldenCase) -> dict[str, Any]:
    images = ("w", "ref_sample")
    names = {f"{name}_{image}" for name in ("pred", "ref_pred", "noise") for image in images}
    case.known(names, {"beta_eff": None, "flip": {"sign", "indicator", "none"}})
    preds = [case.tensor(f"pred_{image}").requires_grad_() for image in images]
    noises = [case.tensor(f"noise_{image}") for image in images]
    errors = PairErrors(
        *(squared_errors(pred, noise) for pred, noise in zip(preds, noises, strict=True)),
        *(squared_errors(case.tensor(f"ref_pred_{i}"), noise) for i, noise in zip(images, noises, strict=True)),
    )
    sign = anchor_sign(errors.d_w, case.params["flip"])
    # the objective halves its beta, as Diffusion-DPO's code does; the file's number is the whole factor
    output = PairObjective(PairConfig(beta=2 * case.params["beta_eff"])).from_margin(anchored_margin(errors, sign))
    gradients = grad(output.loss, preds, allow_unused=True, materialize_grads=True)
    return {"loss": output.loss, "sign": sign, "grad_pred_w": gradients[0], "grad_pred_ref_sample": gradients[1]}
