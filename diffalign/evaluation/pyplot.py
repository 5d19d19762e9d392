"""Matplotlib where it is installed, drawing into files only."""

from __future__ import annotations

from types import ModuleType

from diffalign.errors import MissingExtra


def load_pyplot(purpose: str) -> ModuleType:
    """Return ``matplotlib.pyplot``, set to draw without a screen.

    Args:
        purpose: what needs it, for the message.

    Raises:
        MissingExtra: without matplotlib.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise MissingExtra("matplotlib", "eval", purpose) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
