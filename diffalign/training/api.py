"""Training from Python."""

from __future__ import annotations

from typing import Any

from rich.console import Console

from diffalign.training.assemble import build_run
from diffalign.training.loop import RunResult
from diffalign.training.resolve import resolve_config


def train(dataset: Any = None, *, method: str, console: Console | None = None, **options: Any) -> RunResult:
    """Align a model.

    Args:
        dataset: a ``datasets`` object, a list of rows, a path or a hub name; by default the bundled data.
        method: name of the method (``diffalign.list_methods()``).
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
    return build_run(resolve_config(method, options), dataset, console).fit()
