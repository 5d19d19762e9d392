"""Errors meant for people: what was given, where, what was expected, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """A mistake that the user can fix; command lines print it without a traceback and exit with status 2."""


class RunStopped(UserError):
    """A run cannot go on. Every process raises it at the same place, and what has been learned so far is saved."""


class MissingExtra(UserError, ImportError):
    """An optional package is absent.

    Args:
        package: name of the package that could not be imported.
        extra: the extra of diffalign that installs it.
        purpose: what it was wanted for.
    """

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package!r}; install it with: pip install 'diffalign[{extra}]'")


_LISTED = 12
"""Names listed at most: the layers of a network are hundreds."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a hint such as ``did you mean 'inpo'?`` or, when nothing is close, the first known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean {close[0]!r}?"
    if not names:
        return "none are known"
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return "known: " + ", ".join(names[:_LISTED]) + more


def unknown(what: str, name: str, known: Iterable[str]) -> UserError:
    """Build the error for an unknown name, with the nearest known one."""
    names = list(known)
    return UserError(f"unknown {what} {name!r}: {nearest(name, names)}")


def require_at_least(low: float, options: object, *names: str) -> None:
    """Raise a :class:`UserError` where an option lies below a bound."""
    for name in names:
        value = getattr(options, name)
        if value < low:
            raise UserError(f"{name} is {value}: expected {low:g} or more")


def require_above(low: float, options: object, *names: str) -> None:
    """Raise a :class:`UserError` where an option does not lie above a bound."""
    for name in names:
        value = getattr(options, name)
        if not value > low:
            raise UserError(f"{name} is {value}: expected a number above {low:g}")
