"""Batches: block order, one condition object for one caption, everything encoded once and decided once an example."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.data.cache import LatentCache, PromptCache, TensorStore
from diffalign.data.encode import EncoderOptions, ImageEncoder
from diffalign.data.image_source import UnreadableImage
from diffalign.data.loader import ExampleLoader, LoaderOptions, MicroBatch
from diffalign.data.prepare import FramingOptions
from diffalign.data.schema import Example, ExampleSet, StreamSet
from diffalign.errors import UserError
from diffalign.policies.codec import NonFiniteLatents
from tests.data.support import CountingPolicy, broken, encoded, pair, source, watched
from tests.meeting import Meeting, meet

RANDOM = FramingOptions(center_crop=False, random_flip=True)


def micro(examples: list[Example], seed: int = 0) -> MicroBatch[Example]:
    return MicroBatch(tuple(examples), torch.arange(seed, seed + len(examples)))


def test_rows_stand_in_block_order():
    examples = [pair(i, scores=(1.0, i / 10)) for i in range(3)]
    batch = ImageEncoder(CountingPolicy(), "pairs")(micro(examples))
    single = ImageEncoder(CountingPolicy(), "winners")
    for block in range(2):
        for row, example in enumerate(examples):
            alone = replace(example, images=(example.images[block],), prompts=example.prompts[:1], fields={})
            expected = single(micro([alone])).latents[0]
            assert torch.equal(batch.latents[3 * block + row], expected)
    assert batch.ids == ["pair-0", "pair-1", "pair-2"]
    assert batch.prompts == ["caption 0", "caption 1", "caption 2"]
    assert batch.fields["scores"].shape == (3, 2)
    assert batch.images_per_example == 2


def test_images_of_one_caption_share_the_condition_object():
    shared = ImageEncoder(CountingPolicy(), "pairs")(micro([pair(0), pair(1)]))
    assert shared.conditions[0] is shared.conditions[1]
    own = replace(pair(1), prompts=("first", "second"))
    apart = ImageEncoder(CountingPolicy(), "caption_pairs")(micro([pair(0), own]))
    assert apart.conditions[0] is not apart.conditions[1]
    embeds = [condition.tensors["prompt_embeds"] for condition in apart.conditions]
    assert embeds[0][0] == embeds[1][0]
    assert embeds[0][1] != embeds[1][1]


def test_captions_that_take_turns_are_drawn_by_the_visit_and_encoded_ahead():
    policy = CountingPolicy()
    encoder = ImageEncoder(policy, "mismatched_captions")
    turns = [replace(pair(i), prompts=("true", "w0"), alternatives=("w0", "w1", "w2")) for i in range(30)]
    encoder.precompute(ExampleSet("mismatched_captions", turns, "test"))
    assert sorted(policy.prompts) == ["", "true", "w0", "w1", "w2"]
    true, seen = (condition.tensors["prompt_embeds"].flatten() for condition in encoder(micro(turns)).conditions)
    assert len(policy.prompts) == 5
    assert len(true.unique()) == 1
    assert sorted(seen.tolist()) == sorted(encoder(micro(turns)).conditions[1].tensors["prompt_embeds"].flatten())
    wrong = policy.encode_prompts(["w0", "w1", "w2"]).tensors["prompt_embeds"].flatten()
    counts = [int((seen == value).sum()) for value in wrong]
    assert sum(counts) == 30
    assert min(counts) > 4


def test_caption_dropout_is_decided_once_an_example_from_its_seed():
    encoder = ImageEncoder(CountingPolicy(), "caption_pairs", EncoderOptions(caption_dropout=0.5))
    examples = [replace(pair(i), prompts=(f"a{i}", f"b{i}")) for i in range(40)]
    batch = encoder(micro(examples))
    empty = [condition.tensors["prompt_embeds"].flatten() == 0 for condition in batch.conditions]
    assert torch.equal(empty[0], empty[1])
    assert 8 < empty[0].sum() < 32
    for row in (0, 17, 39):
        alone = encoder(micro([examples[row]], seed=row))
        assert (alone.conditions[0].tensors["prompt_embeds"][0, 0] == 0) == empty[0][row]
    assert batch.prompts[0] == "a0"


def test_caption_dropout_is_refused_where_captions_are_compared():
    with pytest.raises(UserError, match=r"--caption_dropout 0\.1 makes no sense"):
        ImageEncoder(CountingPolicy(), "mismatched_captions", EncoderOptions(caption_dropout=0.1))


def test_crop_and_flip_are_shared_by_the_images_of_an_example():
    wide = [source(1, 12, 30), source(1, 12, 30), source(1, 12, 30)]
    for index in range(10):
        policy = CountingPolicy()
        example = Example(f"list-{index}", ("x",) * 3, tuple(wide))
        latents = ImageEncoder(policy, "ranked_lists", EncoderOptions(RANDOM))(micro([example])).latents
        assert torch.equal(latents[0], latents[1])
        assert policy.images == 1


def test_framing_stays_for_the_run_unless_it_is_drawn_at_each_visit():
    example = Example("wide", ("x",), (source(1, 12, 60),))
    for fixed in (True, False):
        options = EncoderOptions(replace(RANDOM, fixed=fixed))
        encoder = ImageEncoder(CountingPolicy(), "winners", options)
        visits = {encoder(micro([example], seed)).latents.numpy().tobytes() for seed in range(8)}
        assert (len(visits) == 1) == fixed


def test_size_conditioning_has_one_row_an_example():
    policy = CountingPolicy()
    examples = [Example("tall", ("x",) * 2, (source(1, 24, 12), source(2, 36, 12))), pair(1)]
    ImageEncoder(policy, "pairs")(micro(examples))
    assert policy.sizes["original_size"].tolist() == [[24, 12], [12, 12]]
    assert policy.sizes["crop_top_left"].tolist() == [[4, 0], [0, 0]]
    assert policy.sizes["target_size"].tolist() == [[8, 8], [8, 8]]


def test_everything_is_encoded_once_ahead_and_never_again():
    policy = CountingPolicy()
    encoder = ImageEncoder(policy, "pairs", EncoderOptions(encode_batch=3))
    shared = source(0)
    examples = [
        Example(f"e{i}", ("one", "one") if i % 2 else ("two", "two"), (shared, source(i + 1))) for i in range(6)
    ]
    dataset = encoder.precompute(ExampleSet("pairs", examples))
    assert policy.images == 7
    assert sorted(policy.prompts) == ["", "one", "two"]
    before = policy.images, len(policy.prompts)
    cached = encoder(micro(list(dataset.examples)))
    encoder.encode_prompts(["two", ""])
    assert (policy.images, len(policy.prompts)) == before
    fresh = ImageEncoder(CountingPolicy(), "pairs")(micro(examples))
    assert torch.equal(cached.latents, fresh.latents)
    for mine, theirs in zip(cached.conditions, fresh.conditions, strict=True):
        assert torch.equal(mine.tensors["prompt_embeds"], theirs.tensors["prompt_embeds"])


def test_threads_are_started_only_where_there_is_something_to_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, examples = ImageEncoder(CountingPolicy(), "pairs"), [pair(i) for i in range(3)]
    encoder.precompute(ExampleSet("pairs", examples[:2]))
    expected = encoder(micro(examples[:2])).latents

    def refuse(*arguments: Any) -> None:
        raise AssertionError("threads")

    monkeypatch.setattr("diffalign.data.prepare.mapped", refuse)
    assert torch.equal(encoder(micro(examples[:2])).latents, expected)
    ImageEncoder(CountingPolicy(), "prompts")(micro([Example("p", ("hello",))]))
    with pytest.raises(AssertionError, match="threads"):
        encoder(micro(examples))


def test_a_cache_on_disk_serves_the_next_run(tmp_path):
    def encoder(policy: CountingPolicy) -> ImageEncoder:
        caches = LatentCache(TensorStore(tmp_path / "latents")), PromptCache(TensorStore(tmp_path / "prompts"))
        return ImageEncoder(policy, "pairs", EncoderOptions(encoder_id="a"), *caches)

    dataset = ExampleSet("pairs", [pair(i) for i in range(4)])
    first = encoder(CountingPolicy())
    first.precompute(dataset)
    second = encoder(CountingPolicy())
    second.precompute(dataset)
    assert second.policy.images == 0
    assert torch.equal(first(micro([pair(2)])).latents, second(micro([pair(2)])).latents)
    other = ImageEncoder(CountingPolicy(), "pairs", EncoderOptions(encoder_id="b"), first.latents, first.prompts)
    other.precompute(dataset)
    assert other.policy.images == 8


def in_processes(
    count: int, dataset: ExampleSet[Example], folder: Path, **options: Any
) -> list[tuple[ImageEncoder, ExampleSet[Example] | UserError]]:
    """Encode ahead in some processes with one cache folder; return of each its encoder and its data set, or error."""

    def encode(processes: Meeting) -> tuple[ImageEncoder, ExampleSet[Example] | UserError]:
        caches = LatentCache(TensorStore(folder / "latents")), PromptCache(TensorStore(folder / "prompts"))
        encoder = ImageEncoder(CountingPolicy(), "pairs", EncoderOptions(encode_batch=2, **options), *caches)
        try:
            return encoder, encoder.precompute(dataset, processes)
        except UserError as error:
            return encoder, error

    return meet(count, encode)


def test_processes_share_the_encoding_out_and_find_what_the_others_wrote(tmp_path: Path) -> None:
    examples = [pair(i) for i in range(12)]
    shared = in_processes(3, ExampleSet("pairs", examples), tmp_path)
    assert [encoder.policy.images for encoder, _ in shared] == [8, 8, 8]
    assert sum(len(encoder.policy.prompts) for encoder, _ in shared) == 13  # the empty one too
    alone = ImageEncoder(CountingPolicy(), "pairs")
    for encoder, _ in shared:
        batch, expected = encoder(micro(examples)), alone(micro(examples))
        assert torch.equal(batch.latents, expected.latents)
        assert encoder.policy.images == 8
        assert len(encoder.policy.prompts) <= 5


def test_processes_read_no_image_again_that_another_has_encoded(tmp_path: Path) -> None:
    reads: list[str] = []
    images = [watched(f"image-{index}", encoded(index), reads) for index in range(16)]
    examples = [Example(f"e{i}", ("x", "x"), tuple(images[2 * i : 2 * i + 2])) for i in range(8)]
    for encoder, _ in in_processes(2, ExampleSet("pairs", examples), tmp_path):
        encoder(micro(examples))
    assert sorted(reads) == sorted(image.name for image in images)


def test_folders_that_processes_do_not_share_are_filled_by_each(tmp_path: Path) -> None:
    def encode(processes: Meeting) -> ImageEncoder:
        caches = [TensorStore(tmp_path / f"{processes.rank}" / name) for name in ("latents", "prompts")]
        encoder = ImageEncoder(CountingPolicy(), "pairs", None, LatentCache(caches[0]), PromptCache(caches[1]))
        encoder.precompute(ExampleSet("pairs", [pair(i) for i in range(20)]), processes)
        return encoder

    for encoder in meet(2, encode):
        encoder(micro([pair(0), pair(19)]))
        assert encoder.policy.images == 40


def test_processes_agree_on_what_is_unreadable_and_fail_together(tmp_path: Path) -> None:
    examples = [*(pair(i) for i in range(6)), Example("bad", ("x", "x"), (source(80), broken("cut.png")))]
    sets = [dataset for _, dataset in in_processes(2, ExampleSet("pairs", examples), tmp_path / "lenient")]
    assert [[example.id for example in dataset] for dataset in sets] == [[f"pair-{i}" for i in range(6)]] * 2
    errors = [error for _, error in in_processes(2, ExampleSet("pairs", examples), tmp_path / "strict", strict=True)]
    assert all("cut.png" in str(error) for error in errors)


def test_a_stream_decodes_an_image_once_on_the_process_that_trains_on_it() -> None:
    reads: list[str] = []
    data = [encoded(i)[: 60 if i == 2 else None] for i in range(8)]
    examples = [Example(f"e{i}", ("x",), (watched(f"e{i}", data[i], reads),)) for i in range(8)]
    stream = StreamSet("winners", lambda: iter(examples))
    seen, skipped = [], set()
    for rank in range(2):
        encoder = ImageEncoder(CountingPolicy(), "winners")
        options = LoaderOptions(micro_batch=2, accumulation=2, rank=rank, world_size=2)
        step = next(iter(ExampleLoader(stream, options, encoder.prepare.readable)))
        seen += [name for part in step for name in encoder(part).ids]
        skipped |= encoder.prepare.skipped
    assert sorted(seen) == ["e0", "e1", "e3", "e4", "e5", "e6", "e7"]
    assert skipped == {"e2"}
    assert sorted(reads) == [f"e{i}" for i in range(8)]


def test_a_source_without_readable_images_ends_the_run() -> None:
    encoder = ImageEncoder(CountingPolicy(), "winners")
    stream = StreamSet("winners", lambda: iter([Example("bad", ("x",), (broken("cut.png"),))]))
    with pytest.raises(UnreadableImage, match=r"cut\.png"):
        list(ExampleLoader(stream, LoaderOptions(), encoder.prepare.readable))


def test_unreadable_images_are_skipped_and_counted_or_refused():
    examples = [pair(0), Example("bad", ("x", "x"), (source(8), broken("cut.png"))), pair(1)]
    dataset = ImageEncoder(CountingPolicy(), "pairs").precompute(ExampleSet("pairs", examples))
    assert [example.id for example in dataset.examples] == ["pair-0", "pair-1"]
    assert dataset.notes == {"examples with unreadable images skipped": 1}
    with pytest.raises(UnreadableImage, match=r"cut\.png"):
        ImageEncoder(CountingPolicy(), "pairs", EncoderOptions(strict=True)).precompute(ExampleSet("pairs", examples))
    with pytest.raises(UserError, match="nothing to train on is left"):
        ImageEncoder(CountingPolicy(), "pairs").precompute(ExampleSet("pairs", examples[1:2]))


def test_framing_of_each_visit_cannot_be_encoded_ahead():
    encoder = ImageEncoder(CountingPolicy(), "pairs", EncoderOptions(replace(RANDOM, fixed=False)))
    with pytest.raises(UserError, match="cannot be encoded ahead"):
        encoder.precompute(ExampleSet("pairs", [pair(0)]))


def test_latents_of_another_shape_than_promised_are_refused():
    with pytest.raises(UserError, match=r"latents of shape \(3, 4, 4\), but the model expects \(16, 4, 4\)"):
        ImageEncoder(CountingPolicy(channels=16), "pairs")(micro([pair(0)]))


def test_sizes_of_aspect_buckets_reach_the_latents():
    example = replace(pair(0), size=(4, 16))
    assert ImageEncoder(CountingPolicy(), "pairs")(micro([example])).latents.shape == (2, 3, 2, 8)


def test_captions_alone_make_a_batch_without_latents():
    batch = ImageEncoder(CountingPolicy(), "prompts")(micro([Example("p", ("hello",))]))
    assert batch.latents.numel() == 0
    assert len(batch.condition) == 1


def test_what_was_prepared_in_the_background_is_used():
    encoder = ImageEncoder(CountingPolicy(), "pairs")
    plain = micro([pair(0)])
    prepared = encoder.prepare(plain)
    emptied = Example("pair-0", pair(0).prompts, (broken(), broken()))
    batch = encoder(replace(prepared, examples=(emptied,)))
    assert torch.equal(batch.latents, encoder(plain).latents)


def test_captions_alone_keep_their_description_and_the_shape_of_an_image():
    examples = [Example(f"p{i}", (f"caption {i}",), metadata={"tag": str(i)}) for i in range(2)]
    batch = ImageEncoder(CountingPolicy(), "prompts")(micro(examples))
    assert batch.latents.shape == (0, 3, 4, 4)
    assert batch.metadata == [{"tag": "0"}, {"tag": "1"}]
    assert len(batch.conditions) == 1


class OverflowingVAE(CountingPolicy):
    """Overflows on every other image, as half precision may."""

    def encode_images(self, pixels: Tensor, generator: torch.Generator | None = None) -> Tensor:
        raise NonFiniteLatents(range(1, len(pixels), 2), "some rows", torch.float16)


@pytest.mark.parametrize("ahead", [False, True])
def test_an_overflowing_vae_names_the_images(ahead: bool) -> None:
    encoder, examples = ImageEncoder(OverflowingVAE(), "pairs"), [pair(0), pair(1)]
    encode = partial(encoder.precompute, ExampleSet("pairs", examples)) if ahead else partial(encoder, micro(examples))
    with pytest.raises(NonFiniteLatents, match=r"not finite for image-1, image-3: .* float32 or bfloat16"):
        encode()
