"""Where the bundled world lies: inside an installed wheel, or in the checkout's ``assets/``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from diffalign.errors import UserError, nearest

_PACKAGE = Path(__file__).resolve().parent


@cache
def assets_root() -> Path:
    """Return the folder that holds all bundled models and data.

    Raises:
        UserError: if the installation carries none.
    """
    for folder in (_PACKAGE / "_assets", _PACKAGE.parent / "assets"):
        if folder.is_dir():
            return folder
    raise UserError(
        "this installation of diffalign carries no bundled assets; reinstall it, or name a model and a data set"
    )


def bundled_names() -> list[str]:
    """Return the names of everything bundled."""
    return sorted(path.name for path in assets_root().iterdir() if path.is_dir())


def is_bundled(name: str) -> bool:
    """Say whether a plain name (no path separator) means something bundled."""
    return "/" not in name and "\\" not in name and name in bundled_names()


def bundled_path(name: str) -> Path:
    """Return the folder of a bundled model or data set, for example ``"tiny-sd"``.

    Raises:
        UserError: if nothing of that name is bundled.
    """
    folder = assets_root() / name
    if not is_bundled(name):
        raise UserError(f"nothing bundled is called {name!r}: {nearest(name, bundled_names())}")
    return folder
