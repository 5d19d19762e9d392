"""The part of encoding that asks no model: read, decode and frame images, so that a background thread may do it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from diffalign.data.cache import LatentCache, LatentKey
from diffalign.data.image_source import ImageSource, UnreadableImage, image_hash
from diffalign.data.loader import MicroBatch
from diffalign.data.prefetch import mapped
from diffalign.data.schema import Example
from diffalign.data.transforms import draw_framing, place, to_pixels
from diffalign.diffusion.random import derive_seed

_PATIENCE = 100
"""Examples without readable images that may follow each other."""


@dataclass(frozen=True)
class FramingOptions:
    """How images are brought to the training size.

    Args:
        resolution: (height, width) of the training images; None for the policy's own.
        center_crop: crop the centre instead of a random place.
        random_flip: mirror half of the examples.
        fixed: crop and flip belong to the example for the whole run, which makes latents cacheable; otherwise they are
            drawn anew at each visit.
        seed: the run's seed.
    """

    resolution: tuple[int, int] | None = None
    center_crop: bool = True
    random_flip: bool = False
    fixed: bool = True
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Framed:
    """An image placed on the training size.

    Args:
        key: names its latents.
        original: (height, width) of the image as it is stored.
        crop: (top, left) of the crop in the resized image.
    """

    key: LatentKey
    original: tuple[int, int]
    crop: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Pixels:
    """What is to be encoded.

    Args:
        image: name of the image it was cut from.
        values: (3, height, width) uint8.
    """

    image: str
    values: Tensor


@dataclass
class Prepared:
    """A micro-batch before the model is asked.

    Args:
        framed: for each example, its images in block order.
        pixels: by key, for images whose latents are not cached.
    """

    framed: list[list[Framed]] = field(default_factory=list)
    pixels: dict[LatentKey, Pixels] = field(default_factory=dict)


class ImagePreparer:
    """Frames the images of examples; crop and flip are decided once for an example and shared by its images.

    Args:
        options: size, crop, flip.
        resolution: (height, width) for examples without a size of their own.
        encoder_id: identity of the image encoder, part of the keys.
        dtype: type in which latents are kept, part of the keys.
        cached: latents that need no pixels.

    Attributes:
        known: image name -> hash of its bytes, (height, width): those that need not be read again.
        skipped: ids of the examples that :meth:`readable` has left out.
    """

    def __init__(
        self,
        options: FramingOptions,
        resolution: tuple[int, int],
        encoder_id: str,
        dtype: torch.dtype,
        cached: LatentCache,
    ) -> None:
        self.options = options
        self.resolution = resolution
        self._encoder_id = encoder_id
        self._dtype = dtype
        self._cached = cached
        self.known: dict[str, tuple[str, tuple[int, int]]] = {}
        self.skipped: set[str] = set()
        self._unreadable_in_a_row = 0

    def __call__(self, micro: MicroBatch[Example]) -> MicroBatch[Example]:
        """Frame all images of a micro-batch; what came of it is its ``prepared``.

        Raises:
            UnreadableImage: if an image cannot be decoded.
        """
        return self._prepared(micro, skip=False)

    def readable(self, micro: MicroBatch[Example]) -> MicroBatch[Example]:
        """Do the same without the examples whose images cannot be decoded, where nobody has looked at them before.

        Raises:
            UnreadableImage: if so many follow each other that the source must be at fault.
        """
        return self._prepared(micro, skip=True)

    def target(self, example: Example) -> tuple[int, int]:
        """Return (height, width) the images of an example are brought to."""
        return example.size or self.resolution

    def frame(
        self, example: Example, visit_seed: int, remember: bool = False
    ) -> tuple[list[Framed], dict[LatentKey, Pixels]]:
        """Frame the images of one example.

        Args:
            example: the example.
            visit_seed: seed of the visit; decides crop and flip unless they are fixed.
            remember: keep hash and size of each image, so that it need not be read again once its latents are cached.

        Returns:
            its images in block order, and the pixels of those whose latents are not cached.

        Raises:
            UnreadableImage: if an image cannot be decoded.
        """
        options = self.options
        seed = derive_seed(options.seed, example.id) if options.fixed else visit_seed
        framing = draw_framing(seed, options.center_crop, options.random_flip)
        target = self.target(example)
        framed, pixels = [], {}
        for image in example.images:
            data, (digest, size) = self._look_up(image, remember)
            placement = place(size, target, framing)
            key = LatentKey.of(digest, self._encoder_id, target, placement, self._dtype)
            framed.append(Framed(key, size, (placement.top, placement.left)))
            if key not in pixels and key not in self._cached:
                pixels[key] = Pixels(image.name, to_pixels(image.decode(data), placement, target))
        return framed, pixels

    def _prepared(self, micro: MicroBatch[Example], skip: bool) -> MicroBatch[Example]:
        def attempt(visit: tuple[Example, int]) -> tuple[list[Framed], dict[LatentKey, Pixels]] | UnreadableImage:
            try:
                return self.frame(*visit)
            except UnreadableImage as error:
                return error

        prepared, rows = Prepared(), []
        visits = zip(micro.examples, micro.seeds.tolist(), strict=True)
        # threads are for reading and decoding; of images that were encoded ahead there is nothing to read
        ahead = all(image.name in self.known for example in micro.examples for image in example.images)
        for row, result in enumerate(map(attempt, visits) if ahead else mapped(attempt, visits)):
            if isinstance(result, UnreadableImage):
                self._unreadable_in_a_row += 1
                if not skip or self._unreadable_in_a_row == _PATIENCE:
                    raise result
                self.skipped.add(micro.examples[row].id)
                continue
            self._unreadable_in_a_row = 0
            framed, pixels = result
            prepared.framed.append(framed)
            prepared.pixels.update(pixels)
            rows.append(row)
        return replace(micro.select(rows), prepared=prepared)

    def _look_up(self, image: ImageSource, remember: bool) -> tuple[bytes | None, tuple[str, tuple[int, int]]]:
        known = self.known.get(image.name)
        if known is not None:
            return None, known
        data = image.read()
        known = image_hash(data), image.size(data)
        if remember:
            self.known[image.name] = known
        return data, known
