"""``diffalign doctor``: versions, device, memory, attention backends, and what is missing for which extra."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, requires, version

from jsonargparse import ArgumentParser
from packaging.requirements import Requirement
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_CORE = ("torch", "diffusers", "accelerate", "transformers", "peft", "safetensors", "open_clip_torch", "datasets")
_EXTRAS = ("xformers", "eval", "scorers", "weights", "quant", "app", "dev")


def installed(package: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def missing_for(extra: str) -> list[str]:
    """Return the distributions that an extra asks for and that are not installed."""
    wanted = [Requirement(text) for text in requires("diffalign") or []]
    names = [r.name for r in wanted if r.marker is not None and r.marker.evaluate({"extra": extra})]
    return [name for name in names if name != "diffalign" and installed(name) is None]


def device_lines() -> list[tuple[str, str]]:
    """Describe processors, accelerators and memory."""
    import torch

    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 0
    lines = [("processor", f"{platform.machine()}, {os.cpu_count()} cores, {pages / 2**30:.0f} GiB memory")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            lines.append((f"GPU {index}", f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"))
    elif torch.backends.mps.is_available():
        lines.append(("GPU", "Apple Metal"))
    else:
        lines.append(("GPU", "none: runs use the processor"))
    lines.append(("free disk here", f"{shutil.disk_usage('.').free / 2**30:.0f} GiB"))
    return lines


def backend_lines() -> list[tuple[str, str]]:
    """Say which attention backends can be chosen by name."""
    import torch

    flash = importlib.util.find_spec("flash_attn") is not None
    xformers = importlib.util.find_spec("xformers") is not None
    return [
        ("attention sdpa", "ready (default)"),
        ("attention flex", "ready" if torch.cuda.is_available() else "needs a GPU"),
        ("attention flash", "ready" if flash else "package flash-attn is not installed"),
        ("attention xformers", "ready" if xformers else "pip install 'diffalign[xformers]'"),
    ]


def doctor_command(argv: Sequence[str]) -> int:
    """Print the state of the installation."""
    parser = ArgumentParser(prog="diffalign doctor", description="Say what is installed and what is missing.")
    parser.parse_args(list(argv))
    from diffalign import __version__

    table = Table(title=f"diffalign {__version__} on Python {platform.python_version()}", show_header=False)
    for package in _CORE:
        table.add_row(package, installed(package) or "[red]missing[/red]")
    table.add_section()
    for name, value in device_lines() + backend_lines():
        table.add_row(name, escape(value))
    table.add_section()
    for extra in _EXTRAS:
        missing = missing_for(extra)
        table.add_row(rf"extra \[{extra}]", "complete" if not missing else "missing: " + ", ".join(missing))
    Console().print(table)
    return 1 if any(installed(package) is None for package in _CORE if package != "open_clip_torch") else 0
