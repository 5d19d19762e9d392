"""Keep the libraries' own progress bars and notices out of a command's output."""

from __future__ import annotations

import os
import warnings


def quiet_environment() -> None:
    """Ask for silence below errors, before the libraries are imported; what a user set stays."""
    for name in ("TRANSFORMERS_VERBOSITY", "DIFFUSERS_VERBOSITY"):
        os.environ.setdefault(name, "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(diffusers|transformers|peft|accelerate)\..*")


def quiet_libraries() -> None:
    """Switch the libraries' progress bars off; imports them."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
