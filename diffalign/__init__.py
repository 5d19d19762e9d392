"""diffalign aligns diffusion models with human preferences: one training loop, one small strategy for each method."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "train": ("diffalign.training.api", "train"),
    "list_methods": ("diffalign.strategies.registry", "list_methods"),
    "load_policy": ("diffalign.policies.loading", "load_policy"),
    "FunctionReward": ("diffalign.rewards.function", "FunctionReward"),
    "UserError": ("diffalign.errors", "UserError"),
    "optimize_noise": ("diffalign.inference.optimize_noise", "optimize_noise"),
    "best_of_n": ("diffalign.inference.optimize_noise", "best_of_n"),
}
__all__ = [
    "FunctionReward",
    "UserError",
    "__version__",
    "best_of_n",
    "list_methods",
    "load_policy",
    "optimize_noise",
    "train",
]


def __dir__() -> list[str]:
    return __all__


def __getattr__(name: str) -> Any:
    # Importing torch and diffusers costs seconds: pay for them only when something is used.
    if name not in _LAZY:
        raise AttributeError(f"module 'diffalign' has no attribute {name!r}")
    from importlib import import_module

    module, attribute = _LAZY[name]
    return getattr(import_module(module), attribute)
