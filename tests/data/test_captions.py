"""Mismatched captions: never the same meaning, the stated kind, the same for the same seed."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.data.captions import EditOptions, mismatch_captions, mismatches, same_meaning
from diffalign.data.vocabulary import Slots, WordLists
from diffalign.errors import UserError

COLOURS = ("red", "blue", "green", "orange")
SHAPES = ("circle", "square", "star")
RELATIONS = ("left of", "right of", "above", "below")


def captions() -> list[str]:
    """Captions of coloured shapes: the rules have seen none of these words before."""
    found = [f"a photo of {'an' if c == 'orange' else 'a'} {c} {s}" for c in COLOURS for s in SHAPES]
    found += [f"a photo of {n} {s}s" for n in ("two", "three", "four") for s in SHAPES]
    found += [f"a photo of a {a} {r} a {b}" for a in SHAPES for b in SHAPES for r in RELATIONS]
    found += [
        f"a photo of a {c} {a} and a {d} {b}"
        for c, d in [("red", "blue"), ("green", "red")]
        for a in SHAPES
        for b in SHAPES
    ]
    return found


def words(text: str) -> list[str]:
    return ["a" if word == "an" else word for word in text.split()]


def test_the_result_differs_in_meaning_and_repeats_with_the_seed():
    prompts = captions()
    first, again, other = (mismatch_captions(prompts, seed) for seed in (3, 3, 4))
    assert first == again
    assert first != other
    assert len(first) == len(prompts)
    assert not any(same_meaning(a, b) for a, b in zip(prompts, first, strict=True))


def test_replace_changes_exactly_one_word_by_one_of_its_slot():
    classes = [
        set(COLOURS),
        set(SHAPES),
        {s + "s" for s in SHAPES},
        {"two", "three", "four"},
        {"left", "right"},
        {"above", "below"},
    ]
    prompts = captions()
    for prompt, found in zip(prompts, mismatches(prompts, 0, EditOptions(edits=("replace",))), strict=True):
        assert found.kind == "replace"
        changed = [pair for pair in zip(words(prompt), words(found.text), strict=True) if pair[0] != pair[1]]
        assert len(changed) == 1
        assert any(set(changed[0]) <= members for members in classes), (prompt, found.text)


def test_swap_binds_attributes_wrongly_and_keeps_the_words():
    prompts = captions()
    two_coloured = [prompt for prompt in prompts if " and " in prompt and len(set(words(prompt)) & set(SHAPES)) == 2]
    slots = Slots(prompts)
    for prompt, found in zip(
        two_coloured, mismatches(two_coloured, 1, EditOptions(edits=("swap",), vocabulary=slots)), strict=True
    ):
        assert found.kind == "swap"
        assert sorted(words(found.text)) == sorted(words(prompt))
        assert not same_meaning(prompt, found.text)


def test_a_swap_that_says_the_same_is_refused():
    assert same_meaning("a photo of a circle and a star", "A photo of a star and a circle.")
    assert same_meaning("a cat, a dog and an owl", "an owl, a cat and a dog")
    assert not same_meaning("a red circle and a blue star", "a blue circle and a red star")
    assert not same_meaning("a circle left of a star", "a star left of a circle")
    prompts = ["a photo of a red circle and a blue circle", "a photo of a circle and a star", *captions()]
    found = mismatches(prompts, 0, EditOptions(edits=("swap",)))
    assert [found[0].kind, found[1].kind] == ["exchange", "exchange"]


def test_articles_follow_the_word_and_capitals_stay():
    lists = WordLists({"colour": ["red", "orange"]})
    assert mismatch_captions(["A red cat, alone"], 0, EditOptions(vocabulary=lists)) == ["An orange cat, alone"]
    assert mismatch_captions(["an orange cat"], 0, EditOptions(vocabulary=lists)) == ["a red cat"]
    assert mismatch_captions(["Red: a cat"], 0, EditOptions(vocabulary=lists)) == ["Orange: a cat"]


def test_word_lists_name_the_kind_and_bound_the_edits():
    lists = WordLists({"colour": COLOURS, "count": ["two", "three"]})
    found = mismatches(["two red circles", "three owls"], 5, EditOptions(edits=("replace",), vocabulary=lists))
    assert found[0].kind in ("colour", "count")
    assert found[1].text == "two owls"
    assert found[1].kind == "count"


def test_drop_removes_one_part():
    prompts = ["a photo of a cat, a dog and an owl", "a cat"]
    found = mismatches(prompts, 0, EditOptions(edits=("drop",)))
    assert found[0].text in ("a photo of a cat and a dog", "a photo of a cat and an owl")
    assert found[0].kind == "drop"
    assert found[1].kind == "exchange"


def test_strength_applies_several_edits():
    lists = WordLists({"colour": COLOURS, "count": ["two", "three"], "shape": ["circles", "stars"]})
    prompt = "two red circles"
    changes = []
    for strength in (1, 3):
        results = [
            mismatch_captions([prompt], seed, EditOptions(strength=strength, vocabulary=lists))[0] for seed in range(30)
        ]
        changes.append(sum(sum(a != b for a, b in zip(prompt.split(), r.split(), strict=True)) for r in results))
    assert changes[0] == 30
    assert changes[1] > changes[0]


def test_edits_lie_within_the_window():
    lists = WordLists({"colour": COLOURS})
    prompt = "a red cat " + "very " * 60 + "near a blue dog"
    for seed in range(10):
        (found,) = mismatch_captions([prompt], seed, EditOptions(vocabulary=lists, window=10))
        assert found.split()[:3] != prompt.split()[:3]
        assert found.endswith("near a blue dog")


def test_a_users_own_edit_takes_the_place_of_the_rules():
    (found,) = mismatches(
        ["a cat"], 0, EditOptions(rewrite=lambda caption, rng: f"{caption} number {rng.randrange(9)}")
    )
    assert found.kind == "own"
    assert found.text.startswith("a cat number ")
    with pytest.raises(UserError, match=r"returned the caption itself.*'a cat'"):
        mismatch_captions(["a cat"], 0, EditOptions(rewrite=lambda caption, rng: caption.upper()))


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        (["a cat", "a cat"], {}, "no caption can be made that mismatches 'a cat'"),
        (["a cat", "  "], {}, "prompt 1 is empty"),
        (["a cat"], {"edits": ("swop",)}, "did you mean 'swap'"),
        (["a cat"], {"strength": 0}, "strength of caption edits is 0"),
    ],
)
def test_mistakes_are_named(prompts, options, message):
    with pytest.raises(UserError, match=message):
        mismatch_captions(prompts, 0, EditOptions(**options))


def test_a_word_list_needs_two_words():
    with pytest.raises(UserError, match="'colour' has 1 word"):
        WordLists({"colour": ["red", "Red"]})


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.text("abc ,.'é鳥-_7", min_size=1, max_size=20), min_size=2, max_size=8),
    st.integers(0, 2**32),
    st.lists(st.sampled_from(["swap", "replace", "drop", "exchange"]), min_size=1, unique=True),
)
def test_any_text_gives_another_caption_or_a_clear_error(prompts, seed, edits):
    try:
        found = mismatch_captions(prompts, seed, EditOptions(edits=tuple(edits)))
    except UserError:
        return
    assert not any(same_meaning(a, b) for a, b in zip(prompts, found, strict=True))


def test_unseeded_randomness_is_not_used():
    random.seed(0)
    first = mismatch_captions(captions(), 9)
    random.seed(1)
    assert mismatch_captions(captions(), 9) == first
