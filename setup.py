"""Puts the bundled world into built distributions: ``assets/`` of the checkout becomes ``diffalign/_assets/``.

Everything else of the build is in ``pyproject.toml``. An editable installation needs no copy: it reads ``assets/``.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ASSETS = Path("assets")
INSIDE = Path("diffalign", "_assets")


class BuildWithAssets(build_py):
    """Copies the assets beside the package's modules."""

    def run(self) -> None:
        """Build the modules, then add the assets.

        Raises:
            FileNotFoundError: if the checkout lacks its assets; a wheel without them would not run.
        """
        super().run()
        if self.editable_mode:
            return
        for source, target in self._assets():
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        """Return every file that is built."""
        assets = [] if self.editable_mode else [target for _, target in self._assets()]
        return [*super().get_outputs(include_bytecode), *assets]

    def get_source_files(self) -> list[str]:
        """Return every file that a source distribution must carry."""
        return [*super().get_source_files(), *(str(source) for source in _asset_files())]

    def _assets(self) -> list[tuple[Path, str]]:
        return [(source, str(self.build_lib / INSIDE / source.relative_to(ASSETS))) for source in _asset_files()]


def _asset_files() -> list[Path]:
    files = sorted(path for path in ASSETS.rglob("*") if path.is_file())
    if not files:
        raise FileNotFoundError("the checkout has no assets/: get them, or rebuild them with train_scripts/world")
    return files


if __name__ == "__main__":
    setup(cmdclass={"build_py": BuildWithAssets})
