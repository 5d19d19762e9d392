"""``diffalign export``: what a run has learned, for other programs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser


def export_command(argv: Sequence[str]) -> int:
    """Write a run's adapter in another format.

    Raises:
        UserError: for what cannot be read, written, or has no such format.
    """
    parser = ArgumentParser(prog="diffalign export", description="Write a run's adapter for other programs.")
    parser.add_argument("run", type=Path, help="run folder of --train_mode lora, or its LoRA file")
    parser.add_argument(
        "--format",
        type=Literal["kohya", "diffusers", "peft", "merged"],
        required=True,
        help="kohya: ComfyUI, A1111, sd-scripts; diffusers: load_lora_weights; peft: PeftModel; merged: a pipeline",
    )
    parser.add_argument("--output", type=Path, required=True, help="file (kohya, diffusers) or folder (peft, merged)")
    parser.add_argument(
        "--dtype", type=Literal["float32", "bfloat16", "float16"], default="float32", help="type of the weights"
    )
    options = parser.parse_args(list(argv))
    import torch

    from diffalign.cli.quiet import quiet_environment, quiet_libraries
    from diffalign.export.formats import export

    quiet_environment()
    quiet_libraries()
    written = export(options.run, options.format, options.output, getattr(torch, options.dtype))
    sys.stdout.write(f"wrote {written}\n")
    return 0
