"""Optimizers by name, the learning rate as a function of the step, clipping."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffalign.errors import MissingExtra
from diffalign.strategies.base import ParameterGroup
from diffalign.training.config import OptimOptions


def scaled_learning_rate(options: OptimOptions, global_batch: int) -> tuple[float, str]:
    """Return the peak learning rate of the run and a line that says where it comes from."""
    factors = {"none": 1.0, "linear": float(global_batch), "sqrt": math.sqrt(global_batch)}
    rate = options.learning_rate * factors[options.scale_lr]
    if options.scale_lr == "none":
        return rate, f"learning rate {rate:g}"
    rule = {"linear": "global batch", "sqrt": "root of the global batch"}[options.scale_lr]
    return rate, f"learning rate {rate:g} = {options.learning_rate:g} x {rule} {global_batch} (--scale_lr)"


def learning_rate_factor(step: int, total_steps: int, options: OptimOptions) -> float:
    """Return the factor on the peak rate for the optimizer step with this number, from 0.

    A pure function of the step: neither the number of processes nor a resume can change it. Warm-up is linear and its
    first step already moves; "constant" has none. "linear" and "cosine" fall to 0 at ``total_steps``.
    """
    warmup = 0 if options.lr_scheduler == "constant" else options.lr_warmup_steps
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, total_steps - warmup))
    if options.lr_scheduler == "linear":
        return 1.0 - progress
    if options.lr_scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    return 1.0


def require_optimizer(name: str) -> None:
    """Refuse an optimizer whose package is not installed.

    Raises:
        MissingExtra: naming the package.
    """
    if name == "adamw8bit":
        try:
            import bitsandbytes.optim  # noqa: F401
        except ImportError:
            raise MissingExtra("bitsandbytes", "quant", "--optimizer adamw8bit") from None


def build_optimizer(
    groups: Sequence[ParameterGroup], options: OptimOptions, device: torch.device
) -> torch.optim.Optimizer:
    """Make the optimizer over parameter groups; the loop sets each group's rate before every step.

    Adafactor steps by the given rate, whatever the scale of the weights, as in the official code of Diffusion-DPO.

    Raises:
        MissingExtra: if the optimizer needs a package that is not installed.
    """
    parameters = [{"params": list(group.parameters), "lr_scale": group.lr_scale} for group in groups]
    rate, decay = options.learning_rate, options.adam_weight_decay
    betas, eps = (options.adam_beta1, options.adam_beta2), options.adam_epsilon
    if options.optimizer == "sgd":
        momentum = options.sgd_momentum
        return torch.optim.SGD(parameters, lr=rate, momentum=momentum, nesterov=momentum > 0)
    if options.optimizer == "adafactor":
        # torch.optim.Adafactor multiplies the rate by the root mean square of each weight, about 0.02 to 0.05
        from transformers.optimization import Adafactor

        given = {"scale_parameter": False, "relative_step": False, "warmup_init": False, "clip_threshold": 1.0}
        return Adafactor(parameters, lr=rate, weight_decay=decay, **given)
    if options.optimizer == "adamw8bit":
        require_optimizer(options.optimizer)
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=rate, betas=betas, eps=eps, weight_decay=decay)
    # one kernel for all tensors: a LoRA has hundreds of small ones
    fused = device.type in {"cuda", "cpu"}
    return torch.optim.AdamW(parameters, lr=rate, betas=betas, eps=eps, weight_decay=decay, fused=fused)


def clip_gradients(groups: Sequence[ParameterGroup], max_norm: float) -> Tensor:
    """Clip as each group asks and return the norm of all gradients before clipping, without leaving the device.

    Args:
        groups: "global" groups are clipped by their norm together, "per_row" ones by each row's own.
        max_norm: the bound; 0 only measures.
    """
    parameters = [p for group in groups for p in group.parameters if p.grad is not None]
    if not parameters:
        return torch.zeros(())
    total = _norm(parameters)
    if not max_norm:
        return total
    together = [p for group in groups if group.clip == "global" for p in group.parameters if p.grad is not None]
    if together:
        norm = total if len(together) == len(parameters) else _norm(together)
        nn.utils.clip_grads_with_norm_(together, max_norm, norm)
    for group in groups:
        for p in group.parameters if group.clip == "per_row" else ():
            if p.grad is not None:
                norms = p.grad.reshape(len(p), -1).norm(dim=1).reshape(-1, *[1] * (p.dim() - 1))
                p.grad.mul_((max_norm / norms.clamp_min(1e-12)).clamp_max(1.0))
    return total


def _norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the norm of all gradients together, over the shards of all processes where there are any."""
    norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
