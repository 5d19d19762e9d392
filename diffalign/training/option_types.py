"""Do options given in Python have the types that the command line would insist on?"""

from __future__ import annotations

import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from diffalign.errors import UserError, nearest


def check_types(owner: type, options: Mapping[str, Any]) -> None:
    """Compare values with the annotations of a dataclass; names that it does not have are passed over.

    Raises:
        UserError: naming the option, what was given, and what is expected.
    """
    hints = get_type_hints(owner)
    for name, value in options.items():
        if name in hints and not fits(value, hints[name]):
            given = f"option {name!r} is {value!r}, a {type(value).__name__}"
            raise UserError(f"{given}, but must be {describe(hints[name])}{_hint(value, hints[name])}")


def fits(value: Any, hint: Any) -> bool:
    """Say whether a value is of a type; a whole number serves as a float, truth values never serve as numbers."""
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return True
    if origin is Literal:
        return value in args
    if origin in (Union, types.UnionType):
        return any(fits(value, each) for each in args)
    if origin in (list, tuple):
        return isinstance(value, list | tuple) and all(fits(each, args[0]) for each in value)
    if origin is dict:
        return isinstance(value, Mapping) and all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if isinstance(value, bool):
        return hint is bool
    return isinstance(value, int | float) if hint is float else isinstance(value, hint)


def describe(hint: Any) -> str:
    """Say in words what a type takes."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Literal:
        return "one of " + ", ".join(map(repr, args))
    if origin in (Union, types.UnionType):
        return " or ".join(describe(each) for each in args)
    if origin in (list, tuple):
        return f"a list, each {describe(args[0])}"
    if origin is dict:
        return "a mapping of names"
    return "None" if hint is type(None) else f"of type {hint.__name__}"


def _hint(value: Any, hint: Any) -> str:
    choices = [each for each in get_args(hint) if isinstance(each, str)] if get_origin(hint) is Literal else []
    return f": {nearest(value, choices)}" if choices and isinstance(value, str) else ""
