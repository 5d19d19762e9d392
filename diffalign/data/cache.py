"""What is encoded once and kept: latents of images and embeddings of captions.

A key contains exactly what changes the cached tensor, so that a new option elsewhere never makes old caches worthless.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffalign.batch import Condition
from diffalign.data.transforms import Placement
from diffalign.errors import UserError

SHARD_BYTES = 256 * 2**20
_SEPARATOR = "/"


@dataclass(frozen=True)
class LatentKey:
    """All that decides an image's latents.

    Args:
        image: hash of the encoded bytes.
        encoder: identity of the image encoder.
        resolution: (height, width) of the training size.
        resized: (height, width) the image is brought to before the crop.
        crop: (top, left) of the crop.
        flip: mirrored.
        dtype: type the latents are stored in.
    """

    image: str
    encoder: str
    resolution: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    flip: bool
    dtype: torch.dtype

    @classmethod
    def of(
        cls, image: str, encoder: str, resolution: tuple[int, int], placement: Placement, dtype: torch.dtype
    ) -> LatentKey:
        """Make the key of an image placed on the training size."""
        resized, crop = (placement.height, placement.width), (placement.top, placement.left)
        return cls(image, encoder, resolution, resized, crop, placement.flip, dtype)

    def digest(self) -> str:
        """Return the name under which the latents are stored."""
        return _digest("latents", *_values(self))


@dataclass(frozen=True)
class PromptKey:
    """All that decides a caption's embeddings.

    Args:
        prompt: the caption.
        encoder: identity of the text encoders.
        dtype: type the embeddings are stored in.
    """

    prompt: str
    encoder: str
    dtype: torch.dtype

    def digest(self) -> str:
        """Return the name under which the embeddings are stored."""
        return _digest("prompt", *_values(self))


class TensorStore:
    """Named groups of tensors, in memory or in safetensors shards of a folder.

    Shards are written whole and renamed into place, so an interruption loses at most the unwritten one; a shard that
    cannot be read (cut off by other means) is ignored and its entries are made again. Several processes may write into
    one folder.

    Args:
        folder: None keeps everything in memory.
        shard_bytes: a shard is written when so much has gathered.

    Raises:
        UserError: if the folder cannot be made.
    """

    def __init__(self, folder: Path | None = None, shard_bytes: int = SHARD_BYTES) -> None:
        self.folder = folder
        self.unreadable: list[Path] = []
        self._shard_bytes = shard_bytes
        self._memory: dict[str, dict[str, Tensor]] = {}
        self._memory_bytes = 0
        self._shard_of: dict[str, tuple[Any, list[str]]] = {}
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the cache {folder}: {error}; change --cache_dir") from None
            self.refresh()

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._shard_of

    def __len__(self) -> int:
        return len(self._memory.keys() | self._shard_of.keys())

    def get(self, key: str) -> dict[str, Tensor]:
        """Return the tensors stored under a key, on the CPU.

        Raises:
            KeyError: if there are none.
        """
        if key in self._memory:
            return self._memory[key]
        shard, names = self._shard_of[key]
        return {name: shard.get_tensor(f"{key}{_SEPARATOR}{name}") for name in names}

    def put(self, key: str, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors under a key; a key that exists is left alone."""
        if key in self:
            return
        # A view of a batch would keep the whole batch alive.
        entry = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
        }
        self._memory[key] = entry
        self._memory_bytes += sum(value.nbytes for value in entry.values())
        if self.folder is not None and self._memory_bytes >= self._shard_bytes:
            self.flush()

    def flush(self) -> None:
        """Write what has gathered into a shard; does nothing for a store in memory.

        Raises:
            UserError: if the disk is full or not writable; nothing half-written stays behind.
        """
        if self.folder is None or not self._memory:
            return
        flat = {f"{key}{_SEPARATOR}{name}": t for key, entry in self._memory.items() for name, t in entry.items()}
        path = self.folder / f"shard-{_digest(*sorted(flat))}.safetensors"
        temporary = None
        try:
            handle, temporary = tempfile.mkstemp(dir=self.folder, suffix=".part")
            os.close(handle)
            save_file(flat, temporary)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            raise UserError(
                f"cannot write the cache to {self.folder}: {error}; free some space or change --cache_dir"
            ) from None
        self._memory.clear()
        self._memory_bytes = 0
        self._open(path)

    def refresh(self) -> None:
        """Look for shards that other processes have written; all that look then find the same tensors."""
        if self.folder is None:
            return
        self.unreadable, self._shard_of = [], {}
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            self._open(path)

    def _open(self, path: Path) -> None:
        try:
            shard = safe_open(str(path), framework="pt")
        except (SafetensorError, OSError):
            self.unreadable.append(path)
            return
        names: dict[str, list[str]] = {}
        for full in shard.keys():  # noqa: SIM118 - a safetensors handle is no mapping
            key, name = full.split(_SEPARATOR, 1)
            names.setdefault(key, []).append(name)
        for key, members in names.items():
            self._shard_of.setdefault(key, (shard, members))


class LatentCache:
    """Latents of images by :class:`LatentKey`."""

    def __init__(self, store: TensorStore | None = None) -> None:
        self.store = TensorStore() if store is None else store  # an empty store is false

    def __contains__(self, key: LatentKey) -> bool:
        return key.digest() in self.store

    def get(self, key: LatentKey) -> Tensor:
        """Return the latents of one image, (channels, height, width)."""
        return self.store.get(key.digest())["latents"]

    def put(self, key: LatentKey, latents: Tensor) -> None:
        """Keep the latents of one image, (channels, height, width)."""
        self.store.put(key.digest(), {"latents": latents.to(key.dtype)})


class PromptCache:
    """Embeddings of captions by :class:`PromptKey`, each caption once."""

    def __init__(self, store: TensorStore | None = None) -> None:
        self.store = TensorStore() if store is None else store  # an empty store is false

    def __contains__(self, key: PromptKey) -> bool:
        return key.digest() in self.store

    def get(self, keys: Sequence[PromptKey]) -> Condition:
        """Return the condition of several captions, one row each."""
        rows = {key: self.store.get(key.digest()) for key in dict.fromkeys(keys)}
        return Condition.cat([Condition({name: t[None] for name, t in rows[key].items()}) for key in keys])

    def put(self, keys: Sequence[PromptKey], condition: Condition) -> None:
        """Keep the condition of several captions, one row each."""
        for row, key in enumerate(keys):
            entry = {name: value[row] for name, value in condition.tensors.items()}
            typed = {name: t.to(key.dtype) if t.is_floating_point() else t for name, t in entry.items()}
            self.store.put(key.digest(), typed)


def _values(key: LatentKey | PromptKey) -> list[Any]:
    # not ``astuple``, which copies every value: keys are made and looked up at each visit of an image
    return [getattr(key, field.name) for field in fields(key)]


def _digest(*parts: Any) -> str:
    return hashlib.blake2b("\x1f".join(map(repr, parts)).encode(), digest_size=16).hexdigest()
