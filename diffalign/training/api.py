"""Training from Python."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console

from diffalign.rewards.base import Reward
from diffalign.rewards.given import Rewards, described, read_rewards
from diffalign.training.assemble import build_run
from diffalign.training.loop import RunResult
from diffalign.training.resolve import resolve_config
from diffalign.training.trackers import CallbackTracker


def train(
    dataset: Any = None,
    *,
    method: str,
    rewards: Rewards | None = None,
    callback: Callable[[int, Mapping[str, float]], object] | None = None,
    console: Console | None = None,
    **options: Any,
) -> RunResult:
    """Align a model.

    Args:
        dataset: a ``datasets`` object, a list of rows (or of captions, for methods that make their own samples), a path
            or a hub name; by default the bundled data.
        method: name of the method (``diffalign.list_methods()``).
        rewards: for methods that learn from them, as :func:`diffalign.optimize_noise` takes them: ``"pickscore:0.05"``,
            a reward or a function of (images, prompts), or name -> weight, reward, or (reward, weight). The run folder
            names objects by their module; a run that is resumed must be given them again.
        callback: told (step, metrics) whenever ``metrics.jsonl`` is, by default after every optimizer step; on the main
            process.
        console: where to print; by default the terminal.
        **options: every option of the command line under its name, for example ``learning_rate=1e-4``,
            ``output_dir="runs/mine"``, and those of the method, such as ``beta``.

    Returns:
        the run folder, with weights that ``pipe.load_lora_weights(result.folder)`` loads, and what was measured.

    Raises:
        UserError: for unknown methods and options, and for data that cannot be used.

    Example::

        import diffalign

        rows = [{"prompt": "a red circle", "images": ["good.png", "bad.png"], "winner": 0}]
        result = diffalign.train(rows, method="diffusion_dpo", max_train_steps=100, learning_rate=1e-4)
        print(result.folder, result.metrics["loss"])
    """
    objects: dict[str, Reward] = {}
    if isinstance(rewards, str):
        options["rewards"] = rewards
    elif rewards is not None:
        specs, objects = read_rewards(rewards)
        options["rewards"] = described(specs)
    trackers = [CallbackTracker(callback)] if callback is not None else []
    return build_run(resolve_config(method, options), dataset, console, rewards=objects, trackers=trackers).fit()
