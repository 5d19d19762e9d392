"""Options and fixtures of all tests."""

from __future__ import annotations

import os
from pathlib import Path

# Tiny tensors lose more to handing work to threads than they gain; must be said before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden",
        help="folder of golden files that tests/test_golden.py runs",
    )
