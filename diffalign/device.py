"""Where networks run: an accelerator where there is one."""

from __future__ import annotations

import torch

from diffalign.errors import UserError

AUTO = "auto"


def choose_device(name: str = AUTO) -> str:
    """Return the device that a ``--device`` option means.

    Args:
        name: as torch names devices; "auto" is the first of cuda, mps and cpu that is here.

    Raises:
        UserError: for a name that torch does not know, or a device that is not here.
    """
    if name == AUTO:
        here = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
        return next((device for device, found in here.items() if found), "cpu")
    require_device(name, "--device", AUTO)
    return name


def require_device(name: str, option: str, *words: str) -> None:
    """Refuse a device that cannot be used.

    Args:
        name: as torch names devices.
        option: that names it.
        words: what else the option takes.

    Raises:
        UserError: for a name that torch does not know, or a device that is not here.
    """
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as problem:
        reason = str(problem).strip().splitlines()[0]
        known = ", ".join([*words, "cpu", "cuda", "cuda:N"])
        raise UserError(f"{option} {name} cannot be used here ({reason}); choose {known} or mps") from None
