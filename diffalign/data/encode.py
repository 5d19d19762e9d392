"""From examples to batches: latents and conditions, each image and caption encoded once.

Decided once for an example and shared by all its images: crop, flip, caption dropout, size conditioning.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffalign.batch import Condition, ImageBatch
from diffalign.data.cache import LatentCache, LatentKey, PromptCache, PromptKey
from diffalign.data.fields import field_tensors
from diffalign.data.image_source import UnreadableImage
from diffalign.data.loader import MicroBatch
from diffalign.data.prefetch import mapped
from diffalign.data.prepare import FramingOptions, ImagePreparer, Pixels, Prepared
from diffalign.data.schema import SKIPPED, Example, ExampleSet, kind_info
from diffalign.data.team import Alone, Progress, Team, share_of
from diffalign.data.transforms import centred
from diffalign.diffusion.random import rand_rows
from diffalign.errors import UserError
from diffalign.policies.base import Policy
from diffalign.policies.codec import NonFiniteLatents
from diffalign.strategies.base import DataKind


@dataclass(frozen=True)
class EncoderOptions:
    """How images and captions are turned into batches.

    Args:
        framing: size, crop and flip of the images.
        caption_dropout: probability that an example is seen with the empty caption in a visit.
        encoder_id: identity of the model's encoders, part of all cache keys; must differ where weights differ.
        encode_batch: images or captions in one pass while a data set is encoded ahead.
        strict: refuse unreadable images instead of leaving their examples out, counted.
    """

    framing: FramingOptions = field(default_factory=FramingOptions)
    caption_dropout: float = 0.0
    encoder_id: str = ""
    encode_batch: int = 16
    strict: bool = False


class ImageEncoder:
    """Turns micro-batches of examples into :class:`ImageBatch`.

    Args:
        policy: encodes images and captions.
        kind: kind of the examples.
        options: sizes, crops, dropout.
        latents: cache of latents; filled by :meth:`precompute` only.
        prompts: cache of embeddings; filled by :meth:`precompute` only.

    Raises:
        UserError: if the kind forbids caption dropout, or the resolution does not fit the policy.

    Example::

        encoder = ImageEncoder(policy, "pairs", EncoderOptions(caption_dropout=0.1))
        dataset = encoder.precompute(dataset)
        loader = ExampleLoader(dataset.examples, LoaderOptions(micro_batch=4, prefetch=2), encoder.prepare)
        for micro_batches in loader:
            batches = [encoder(micro) for micro in micro_batches]
    """

    def __init__(
        self,
        policy: Policy,
        kind: DataKind,
        options: EncoderOptions | None = None,
        latents: LatentCache | None = None,
        prompts: PromptCache | None = None,
    ) -> None:
        self.policy = policy
        self.options = options or EncoderOptions()
        self.latents = LatentCache() if latents is None else latents
        self.prompts = PromptCache() if prompts is None else prompts
        resolution = self.options.framing.resolution or policy.default_resolution
        policy.latent_shape(*resolution)  # refuses sizes that do not fit
        self.dtype = torch.float32 if policy.dtype == torch.float32 else torch.float16
        self.prepare = ImagePreparer(
            self.options.framing, resolution, self.options.encoder_id, self.dtype, self.latents
        )
        if self.options.caption_dropout and not kind_info(kind).caption_dropout:
            raise UserError(
                f"--caption_dropout {self.options.caption_dropout} makes no sense for {kind.replace('_', ' ')}: with "
                "both captions empty there is nothing to compare; set it to 0"
            )

    @torch.no_grad()
    def __call__(self, micro: MicroBatch[Example]) -> ImageBatch:
        """Encode a micro-batch.

        Returns:
            rows in block order; latents float32 on the policy's device, without rows where examples have no images.

        Raises:
            UnreadableImage: if an image cannot be decoded.
            NonFiniteLatents: if the VAE overflows; the images are named.
            UserError: if latents come out in another shape than the policy promises.
        """
        prepared = micro.prepared if isinstance(micro.prepared, Prepared) else self.prepare(micro).prepared
        fresh = self._encode_pixels(prepared.pixels)
        images = len(micro.examples[0].images)
        keys = [framed[block].key for block in range(images) for framed in prepared.framed]
        rows = [fresh[key] if key in fresh else self.latents.get(key) for key in keys]
        device = self.policy.device
        return ImageBatch(
            ids=[example.id for example in micro.examples],
            seeds=micro.seeds,
            prompts=[captions[0] for captions in self._captions(micro)],
            fields=field_tensors(micro.examples, device),
            cache_keys=micro.cache_keys,
            metadata=[example.metadata for example in micro.examples],
            latents=torch.stack([row.to(device) for row in rows]).float() if rows else self._no_latents(micro.examples),
            conditions=self._conditions(micro, prepared, blocks=max(1, images)),
        )

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> Condition:
        """Return the condition of captions on the policy's device, one row each, from the cache where it holds all."""
        device = self.policy.device
        keys = [self._prompt_key(prompt) for prompt in prompts]
        if all(key in self.prompts for key in keys):
            return self.prompts.get(keys).to(device)
        row_of = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
        condition = self.policy.encode_prompts(list(row_of)).to(device, self.policy.dtype)
        return condition.select(torch.tensor([row_of[prompt] for prompt in prompts], device=device))

    @torch.no_grad()
    def precompute(
        self, dataset: ExampleSet[Example], team: Team | None = None, progress: Progress | None = None
    ) -> ExampleSet[Example]:
        """Encode every image and caption of a data set into the caches, each once.

        The order of work is that of the data, so a resumed run gets the same bits. With a cache folder the processes
        share the work out and read what the others have written; without one each does, and keeps, all of it.

        Args:
            dataset: the examples.
            team: the processes of the run; all call this together.
            progress: told how far this process is.

        Returns:
            the data set without the examples whose images cannot be decoded; how many is noted.

        Raises:
            UnreadableImage: for such an image when ``strict`` is set.
            UserError: if no example is left, or framing changes at every visit.
        """
        if not self.options.framing.fixed:
            raise UserError("images whose crop or flip changes at every visit cannot be encoded ahead of training")
        if team is None or self.latents.store.folder is None:
            team = Alone()
        examples, block = dataset.examples, self.options.encode_batch

        def encode_images() -> tuple[set[str], dict[str, Any]]:
            unreadable = self._keep_latents(share_of(team, examples, block), progress)
            self.latents.store.flush()
            return unreadable, self.prepare.known

        unreadable: set[str] = set()
        for names, known in team.together(encode_images):
            unreadable |= names
            self.prepare.known.update(known)
        kept = [example for example in examples if example.id not in unreadable]
        every = (caption for example in kept for caption in example.prompts + example.alternatives)
        captions = list(dict.fromkeys([*every, ""]))

        def encode_captions() -> None:
            self._keep_prompts(share_of(team, captions, block), progress)
            self.prompts.store.flush()

        team.together(encode_captions)
        if team.world_size > 1:
            for store in (self.latents.store, self.prompts.store):
                store.refresh()
            # nothing is left to do, unless machines have folders of their own
            self._keep_latents(kept)
            self._keep_prompts(captions)
        return dataset.with_examples(kept, {SKIPPED: len(dataset) - len(kept)})

    def _no_latents(self, examples: Sequence[Example]) -> Tensor:
        return torch.empty(0, *self.policy.latent_shape(*self.prepare.target(examples[0])), device=self.policy.device)

    def _encode_pixels(self, pixels: dict[LatentKey, Pixels]) -> dict[LatentKey, Tensor]:
        encoded: dict[LatentKey, Tensor] = {}
        for height, width in dict.fromkeys(key.resolution for key in pixels):
            keys = [key for key in pixels if key.resolution == (height, width)]
            rows = torch.stack([pixels[key].values for key in keys])
            try:
                latents = self.policy.encode_images(centred(rows.to(self.policy.device)))
            except NonFiniteLatents as error:
                images = ", ".join(pixels[keys[row]].image for row in error.rows)
                raise NonFiniteLatents(error.rows, images, error.dtype) from None
            expected = tuple(self.policy.latent_shape(height, width))
            if tuple(latents.shape[1:]) != expected:
                raise UserError(
                    f"images of {height}x{width} pixels gave latents of shape {tuple(latents.shape[1:])}, but "
                    f"the model expects {expected}: choose another --resolution"
                )
            # Cached or fresh, the numbers must be the same.
            encoded.update(zip(keys, latents.to(self.dtype), strict=True))
        return encoded

    def _keep_latents(self, examples: Sequence[Example], progress: Progress | None = None) -> set[str]:
        """Encode the images of examples that the cache lacks; return the names of examples that cannot be decoded."""
        unreadable: set[str] = set()
        pending: dict[LatentKey, Pixels] = {}
        for done, (example, found) in enumerate(zip(examples, mapped(self._pixels, examples), strict=True)):
            if isinstance(found, UnreadableImage):
                if self.options.strict:
                    raise found
                unreadable.add(example.id)
                continue
            # an image of several examples may have been encoded since it was decoded
            pending.update({key: pixels for key, pixels in found.items() if key not in self.latents})
            if len(pending) >= self.options.encode_batch:
                self._keep_encoded(pending)
            if progress is not None:
                progress("examples encoded", done + 1, len(examples))
        self._keep_encoded(pending)
        return unreadable

    def _pixels(self, example: Example) -> dict[LatentKey, Pixels] | UnreadableImage:
        try:
            return self.prepare.frame(example, 0, remember=True)[1]
        except UnreadableImage as error:
            return error

    def _keep_encoded(self, pending: dict[LatentKey, Pixels]) -> None:
        for key, latents in self._encode_pixels(pending).items():
            self.latents.put(key, latents)
        pending.clear()

    def _keep_prompts(self, prompts: Sequence[str], progress: Progress | None = None) -> None:
        missing = [prompt for prompt in prompts if self._prompt_key(prompt) not in self.prompts]
        for start in range(0, len(missing), self.options.encode_batch):
            part = missing[start : start + self.options.encode_batch]
            self.prompts.put([self._prompt_key(prompt) for prompt in part], self.policy.encode_prompts(part))
            if progress is not None:
                progress("captions encoded", start + len(part), len(missing))

    def _prompt_key(self, prompt: str) -> PromptKey:
        return PromptKey(prompt, self.options.encoder_id, self.policy.dtype)

    def _conditions(self, micro: MicroBatch[Example], prepared: Prepared, blocks: int) -> tuple[Condition, ...]:
        """Return one condition a block; blocks with the same captions share the object."""
        chances = rand_rows(micro.seeds, "caption_dropout", torch.device("cpu"))
        dropped = (chances < self.options.caption_dropout).tolist()
        drawn, sizes = self._captions(micro), self._sizes(micro.examples, prepared)
        made: dict[tuple[str, ...], Condition] = {}
        conditions = []
        for block in range(blocks):
            captions = tuple("" if drop else captions[block] for captions, drop in zip(drawn, dropped, strict=True))
            if captions not in made:
                made[captions] = self.policy.with_size(self.encode_prompts(captions), sizes)
            conditions.append(made[captions])
        return tuple(conditions)

    @staticmethod
    def _captions(micro: MicroBatch[Example]) -> list[tuple[str, ...]]:
        """Return the captions of each example in this visit."""
        draws = rand_rows(micro.seeds, "alternative", torch.device("cpu")).tolist()
        return [example.captions(draw) for example, draw in zip(micro.examples, draws, strict=True)]

    def _sizes(self, examples: Sequence[Example], prepared: Prepared) -> dict[str, Tensor]:
        """Size conditioning, each (B, 2) of (height or top, width or left), from the first image of an example."""
        targets = [self.prepare.target(example) for example in examples]
        firsts = [framed[0] if framed else None for framed in prepared.framed]
        named = {
            "original_size": [f.original if f else target for f, target in zip(firsts, targets, strict=True)],
            "crop_top_left": [f.crop if f else (0, 0) for f in firsts],
            "target_size": targets,
        }
        return {name: torch.tensor(values, device=self.policy.device) for name, values in named.items()}
