"""What a run says of its model, its preset and its learning rate before it begins."""

from __future__ import annotations

from diffalign.policies.adapters import START_ADAPTER
from diffalign.policies.base import BasePolicy
from diffalign.strategies.base import Spec
from diffalign.training.config import OptimOptions, TrainConfig
from diffalign.training.presets import NONE, read_preset


def model_line(config: TrainConfig, policy: BasePolicy) -> str:
    """Name the model, the preset whose defaults the run has, and the adapter that training starts from."""
    model, preset = config.model.pretrained_model_name_or_path, config.model.preset
    if preset == NONE:
        defaults = "no preset: options that are not given have the package's defaults"
    elif read_preset(preset, config.method, config.model.train_mode).whole:
        defaults = f"preset {preset}"
    else:
        defaults = f"preset {preset}, which has nothing for this method and way of training: its model's settings alone"
    line = f"model {model}; {defaults}"
    if START_ADAPTER not in policy.adapters.names:
        return line
    start = policy.adapters.settings(START_ADAPTER)
    return f"{line}; continues from the adapter {config.model.start_adapter or model} (rank {start.rank})"


def rate_origin(config: TrainConfig, spec: Spec) -> str:
    """Say where the rate comes from, where neither a preset nor an option has chosen it for adapters; else nothing."""
    model = config.model
    adapters = model.train_mode == "lora" and spec.trains == "policy"
    preset = read_preset(model.preset, config.method).options if model.preset != NONE else {}
    if not adapters or "learning_rate" in preset or config.optim.learning_rate != OptimOptions().learning_rate:
        return ""
    return (
        " (the default of every method, diffusers' for Diffusion-DPO with LoRA; published LoRA runs of other methods "
        "take up to 1e-3)"
    )
