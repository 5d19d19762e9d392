"""The demanding methods, in small, through the real loop: one process against formulas, two processes against one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from tests.interface.run_fakes import FAKES
from tests.interface.train_fakes import train_fake

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("name", FAKES)
def test_one_process_does_what_the_formula_says(name: str, tmp_path: Path) -> None:
    got = train_fake(name, tmp_path, micro=2)
    assert_close(got, FAKES[name]().direct(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", [name for name in FAKES if name != "StatisticOverMicroBatch"])
@pytest.mark.parametrize("micro", [1, 4])
def test_micro_batches_change_nothing(name: str, micro: int, tmp_path: Path) -> None:
    assert_close(train_fake(name, tmp_path, micro=micro), FAKES[name]().direct(), rtol=1e-10, atol=1e-12)


def test_two_processes_do_the_same(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += ["-m", "tests.interface.train_fakes", str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    for name, fake in FAKES.items():
        for rank in range(2):
            saved = json.loads((tmp_path / f"{name}-{rank}.json").read_text())
            got = {key: torch.tensor(value, dtype=torch.float64) for key, value in saved.items()}
            assert_close(got, fake().direct(), rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_kept_best_includes_the_start(tmp_path: Path) -> None:
    train_fake("TrainsNoise", tmp_path, micro=2)
    assert len(json.loads((tmp_path / "run" / "noise.json").read_text())) == 5
    assert not (tmp_path / "run" / "toy.pt").exists()
