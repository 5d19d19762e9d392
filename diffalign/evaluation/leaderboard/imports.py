"""Which modules of this package a run imports, read from the source, and a hash of what they do."""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Collection, Iterable, Iterator
from functools import cache
from pathlib import Path

import diffalign

_PACKAGE = diffalign.__name__
_ROOT = Path(diffalign.__file__).parent


def imported_modules(roots: Iterable[str], without: Collection[str] = ()) -> set[str]:
    """Return the modules of this package that some modules import, directly or not, themselves included.

    Imports inside functions count; those for type checkers alone do not. Modules that are found by name at run time
    (strategies, rewards, policies) are not seen: name the one that is used among the roots.

    Args:
        roots: dotted names.
        without: modules that are left out with all that only they import.
    """
    found: set[str] = set()
    open_ = list(roots)
    while open_:
        name = open_.pop()
        if name not in found and name not in without:
            found.add(name)
            open_ += _imports(name)
    return found


def source_hash(modules: Iterable[str]) -> str:
    """Hash of what modules do: comments, docstrings and layout do not count."""
    digest = hashlib.sha256()
    for name in sorted(modules):
        digest.update(f"{name}\n{_meaning(name)}\n".encode())
    return digest.hexdigest()[:16]


def module_path(name: str) -> Path | None:
    """Return the file of a module of this package, None if there is none."""
    parts = name.split(".")
    base = _ROOT.joinpath(*parts[1:])
    candidates = (base.with_suffix(".py"), base / "__init__.py") if len(parts) > 1 else (base / "__init__.py",)
    return next((path for path in candidates if parts[0] == _PACKAGE and path.is_file()), None)


def _tree(name: str) -> ast.Module:
    path = module_path(name)
    if path is None:
        raise ValueError(f"{_PACKAGE} has no module {name!r}")
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def _imports(name: str) -> tuple[str, ...]:
    """Modules of this package that a module names in its imports, all of them absolute."""
    named: list[str] = []
    for node in _at_run_time(_tree(name)):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            named += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    return tuple(dict.fromkeys(name for name in named if module_path(name) is not None))


def _at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without what stands under ``if TYPE_CHECKING``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from _at_run_time(child)


@cache
def _meaning(name: str) -> str:
    tree = _tree(name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)
