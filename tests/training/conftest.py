"""What tests of whole runs share: a tiny model, pairs of tiny pictures, threads as several processes have them."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.factories import save_tiny


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    save_tiny("sd", folder)
    return str(folder)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five pairs: a global batch of four leaves one for the last step of an epoch."""
    from PIL import Image

    folder = tmp_path_factory.mktemp("pairs")
    rng = np.random.default_rng(0)
    rows = []
    for index in range(5):
        names = [f"{index}-{side}.png" for side in ("good", "bad")]
        for name in names:
            Image.fromarray(rng.integers(0, 255, (16, 16, 3), dtype=np.uint8)).save(folder / name)
        rows.append({"id": str(index), "prompt": f"a {index}", "images": names, "winner": 0})
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder / "pairs.jsonl")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """As many threads as each of several processes has: their number changes the order of sums."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
