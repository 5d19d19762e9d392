"""The built wheel carries the bundled world and the presets, and runs away from the checkout."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from setuptools.dist import Distribution

from diffalign.training.resolve import resolve_defaults

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "diffalign", "assets")

LOOK = """
import diffalign
from diffalign.bundled import bundled_path
from diffalign.training.resolve import resolve_defaults

print(diffalign.__file__)
print(bundled_path("tiny-sd"))
print(resolve_defaults("diffusion_dpo")["max_train_steps"])
"""


def test_the_build_is_configured_to_carry_assets_presets_and_pages(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    configured = tomllib.loads(Path("pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["diffalign"]
    package = ROOT / "diffalign"
    data = {path for pattern in configured for path in package.glob(pattern)}
    pages = [*(package / "label" / "page").iterdir(), *package.rglob("*.j2")]
    assert {*(package / "presets").rglob("*.yaml"), *pages, package / "py.typed"} == data

    builder = _builder(tmp_path)
    carried = {Path(path).relative_to(tmp_path) for path in builder.get_outputs() if "_assets" in path}
    lying = {path.relative_to("assets") for path in Path("assets").rglob("*") if path.is_file()}
    assert carried == {Path("diffalign", "_assets", path) for path in lying}
    assert {str(Path("assets", path)) for path in lying} <= set(builder.get_source_files())


def test_a_checkout_without_assets_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    builder = _builder(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no assets/"):
        builder.get_outputs()


@pytest.mark.slow
def test_the_wheel_runs_from_another_folder(tmp_path: Path) -> None:
    target = _install(_build(tmp_path), tmp_path / "site")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    environment = {**os.environ, "PYTHONPATH": str(target), "OMP_NUM_THREADS": "1"}

    said = _run([sys.executable, "-c", LOOK], elsewhere, environment).split()
    inside = target / "diffalign"
    preset = resolve_defaults("diffusion_dpo")["max_train_steps"]
    assert said == [str(inside / "__init__.py"), str(inside / "_assets" / "tiny-sd"), str(preset)]

    command = "import sys; from diffalign.cli import main; sys.exit(main())"
    flags = ["--max_train_steps=2", "--train_batch_size=2", "--evaluation_prompts=0", "--num_validation_images=1"]
    flags += ["--max_train_samples=8", "--num_inference_steps=2"]
    _run([sys.executable, "-c", command, "train", "--method", "diffusion_dpo", *flags], elsewhere, environment)
    assert (elsewhere / "runs" / "diffusion_dpo-001" / "pytorch_lora_weights.safetensors").is_file()


def _builder(build_lib: Path) -> Any:
    """Return the build command of the ``setup.py`` in the current folder."""
    spec = importlib.util.spec_from_file_location("setup_under_test", Path("setup.py").resolve())
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    distribution = Distribution({"script_name": "setup.py"})
    distribution.parse_config_files()
    builder = module.BuildWithAssets(distribution)
    builder.build_lib = str(build_lib)
    builder.ensure_finalized()
    return builder


def _build(folder: Path) -> Path:
    """Build the wheel from a copy of the sources, so that nothing is written to the checkout."""
    copy = folder / "checkout"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    _run([sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), "."], copy, os.environ)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _install(wheel: Path, target: Path) -> Path:
    """Unpack a wheel without its dependencies; a pure wheel needs no more than that to be imported."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    return target


def _run(command: list[str], folder: Path, environment: dict[str, str] | os._Environ[str]) -> str:
    done = subprocess.run(
        command, cwd=folder, env=dict(environment), capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
