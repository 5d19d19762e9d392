"""Rewards as Python gives them: one meaning in every form, and a text that says what was used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.compose import load_parts, parse_rewards
from diffalign.rewards.function import FunctionReward
from diffalign.rewards.given import described, read_rewards, weighted

IMAGES = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def brightness(images: Tensor, prompts: Sequence[str]) -> Tensor:
    return images.mean(dim=(1, 2, 3))


BRIGHT = FunctionReward(brightness, "bright", differentiable=True)


@pytest.mark.parametrize(
    ("given", "factor"),
    [
        (brightness, 1.0),
        (BRIGHT, 1.0),
        ({"mine": brightness}, 1.0),
        ({"mine": (BRIGHT, 0.5)}, 0.5),
        ({"a": BRIGHT, "b": (brightness, 2)}, 3.0),
        (weighted({"mine": (BRIGHT, 0.25)}), 0.25),
    ],
)
def test_every_form_is_a_weighted_sum(given: Any, factor: float) -> None:
    torch.testing.assert_close(weighted(given).score(IMAGES, ["", ""]), factor * brightness(IMAGES, []))


def test_what_is_given_by_name_means_what_it_means_on_the_command_line() -> None:
    specs, objects = read_rewards({"incompressibility": 0.1, "clip@folder": 2})
    assert (specs, objects) == (parse_rewards("incompressibility:0.1,clip@folder:2"), {})
    assert parse_rewards(described(specs)) == specs


def test_a_configuration_names_an_object_and_cannot_bring_it_back() -> None:
    specs, objects = read_rewards({"mine": (brightness, 0.5), "incompressibility": 1.0})
    text = described(specs)
    assert text == f"mine@(python {__name__}.brightness):0.5,incompressibility:1.0"
    again = parse_rewards(text)
    assert [spec.label for spec in again] == ["mine", "incompressibility"]
    assert load_parts(again, given=objects)["mine"] is objects["mine"]
    with pytest.raises(UserError, match="'mine' was a Python object"):
        load_parts(again)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "no rewards"),
        ({"mine": "pickscore"}, "'mine' is a str: give a weight, a Reward, or a function"),
        ({"mine": (BRIGHT, "much")}, "expected a number"),
        (7, "is a int"),
    ],
)
def test_what_is_no_reward_is_refused(given: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        read_rewards(given)


def test_a_name_that_no_configuration_can_hold_is_refused() -> None:
    specs, _ = read_rewards({"mine:best": BRIGHT})
    with pytest.raises(UserError, match="needs a name without"):
        described(specs)
