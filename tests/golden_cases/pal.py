"""PAL: ideal points, scores of two images, losses and their gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from diffalign.rewards.objective import margin_loss, preference_cross_entropy
from diffalign.rewards.pal import PalConfig, PalHead, out_of_bounds
from tests.golden_cases.base import GoldenCase

COMMON = {"x_left", "x_right", "label"}
OF_MODEL = {
    "A": {"projector_weight", "projector_bias", "prototypes"},
    "B": {"prompt", "item_projector", "prompt_projectors"},
}


def run(case: GoldenCase) -> dict[str, Any]:
    case.known(
        {**dict.fromkeys(COMMON | OF_MODEL.get(case.params["model"], set())), "users": str, "user_weight_logits": dict},
        {
            "model": OF_MODEL.keys(),
            "distance": {"dist", "angle"},
            "user_point": {"f(P)w", "f(Pw)", "Pw"},
            "loss": {"hinge", "hinge_smooth", "logistic", "CE"},
            **dict.fromkeys(("bound", "logit_scale", "softmax_temperature")),
        },
    )
    head = _head(case)
    users = case.inputs["users"]
    captions = case.tensor("prompt") if case.params["model"] == "B" else None
    points = head.ideal_points(head.mixtures(users), captions)
    left, right = (head(case.tensor(name), points) for name in ("x_left", "x_right"))
    # The file's label is +1 for the right image; labels here are 1 for the first.
    labels = (1 - case.tensor("label")) / 2
    output = right - left
    if case.params["distance"] == "angle":
        output = torch.stack([left, right], dim=-1)
    if case.params["loss"] == "CE":
        loss = preference_cross_entropy(torch.stack([left, right], dim=-1), labels)
    else:
        loss = margin_loss(left - right, labels, case.params["loss"])
    result = {"output": output, "user_points": points, "loss": loss}
    if "bound" in case.params:
        result["bound_loss"] = out_of_bounds(points, case.params["bound"])
    return result | _gradients(head, loss, captions is not None)


def _head(case: GoldenCase) -> PalHead:
    """The head with the case's linear projectors."""
    by_prompt = case.params["model"] == "B"
    weight = case.tensor("item_projector" if by_prompt else "projector_weight")
    config = PalConfig(
        dimensions=weight.shape[1],
        width=weight.shape[0],
        prototypes=len(case.inputs["prompt_projectors" if by_prompt else "prototypes"]),
        place="prompt" if by_prompt else case.params["user_point"],
        distance=case.params["distance"],
        layers=1,
        temperature=case.params.get("softmax_temperature", 1.0),
    )
    logits = case.inputs["user_weight_logits"]
    head = PalHead(config, logits).to(case.dtype)
    bias = torch.zeros(config.width) if by_prompt else case.tensor("projector_bias")
    with torch.no_grad():
        _set_linear(head.items[0], weight, bias)
        head.logits.copy_(torch.tensor(list(logits.values()), dtype=case.dtype))
        head.logit_scale.fill_(case.params["logit_scale"])
        if by_prompt:
            for project, value in zip(head.captions, case.tensor("prompt_projectors"), strict=True):
                _set_linear(project[0], value, torch.zeros(config.width))  # type: ignore[index]
        else:
            head.prototypes.copy_(case.tensor("prototypes"))
    return head


def _set_linear(layer: nn.Module, weight: Tensor, bias: Tensor) -> None:
    layer.weight.copy_(weight)  # type: ignore[operator, union-attr]
    layer.bias.copy_(bias)  # type: ignore[operator, union-attr]


def _gradients(head: PalHead, loss: Tensor, by_prompt: bool) -> dict[str, Any]:
    name = "grad_item_projector" if by_prompt else "grad_projector_weight"
    wanted = {name: head.items[0].weight, "logits": head.logits, "grad_prototypes": head.prototypes}
    found = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True, materialize_grads=True)  # type: ignore[arg-type]
    gradients = dict(zip(wanted, found, strict=True))
    by_user = gradients.pop("logits")
    return {**gradients, "grad_user_weights": {user: by_user[row] for user, row in head.users.items()}}
