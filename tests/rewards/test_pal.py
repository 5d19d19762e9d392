"""PAL: one ideal for all, one for each of two groups, a new person from ten answers; the reward that loads it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.loading import load_reward
from diffalign.rewards.objective import margin_loss
from diffalign.rewards.pal import PalConfig, PalHead
from diffalign.rewards.pal_reward import PalReward, save_pal
from tests.rewards.support import PROMPTS, check_gradient, waves

USERS = [f"user{index}" for index in range(12)]


def answers(user: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs of items and what a user thinks: even users like the first coordinate large, odd ones small."""
    items = torch.randn(2, count, 6, generator=torch.Generator().manual_seed(seed))
    taste = 1.0 if int(user.removeprefix("user")) % 2 == 0 else -1.0
    return items[0], items[1], (taste * (items[0] - items[1])[:, 0] > 0).float()


def accuracy(head: PalHead, users: list[str], seed: int = 1000) -> float:
    right = []
    for index, user in enumerate(users):
        first, second, labels = answers(user, 100, seed + index)
        points = head.ideal_points(head.mixtures([user] * 100))
        right.append(((head(first, points) > head(second, points)).float() == labels).float().mean())
    return torch.stack(right).mean().item()


def fit(head: PalHead, users: list[str], parameters: list[torch.nn.Parameter], pairs: int, steps: int) -> None:
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    data = [answers(user, pairs, seed) for seed, user in enumerate(users)]
    first, second, labels = (torch.cat(parts) for parts in zip(*data, strict=True))
    names = [user for user in users for _ in range(pairs)]
    for _ in range(steps):
        points = head.ideal_points(head.mixtures(names))
        loss = margin_loss(head(first, points) - head(second, points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def test_two_points_serve_people_who_disagree_and_one_does_not() -> None:
    shape = {"dimensions": 6, "width": 4, "layers": 1, "place": "Pw"}
    alone = PalHead(PalConfig(prototypes=1, **shape), USERS)  # type: ignore[arg-type]
    fit(alone, USERS, list(alone.parameters()), pairs=30, steps=120)
    assert 0.4 < accuracy(alone, USERS) < 0.6
    head = PalHead(PalConfig(prototypes=2, **shape), USERS)  # type: ignore[arg-type]
    fit(head, USERS, list(head.parameters()), pairs=30, steps=120)
    assert accuracy(head, USERS) > 0.9
    # A new person costs two numbers: all else stays.
    head.add_users(["user20", "user21"])
    frozen = {name: value.clone() for name, value in head.state_dict().items() if name != "logits"}
    fit(head, ["user20", "user21"], [head.logits], pairs=10, steps=100)
    assert accuracy(head, ["user20", "user21"]) > 0.85
    assert all(torch.equal(head.state_dict()[name], value) for name, value in frozen.items())


def test_what_must_hold_of_ideal_points() -> None:
    head = PalHead(PalConfig(6, width=4, layers=1, place="Pw"), ["a", "b"])
    one_hot = head.ideal_points(torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(one_hot[0], head.prototypes[1])
    items = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    points = head.ideal_points(head.mixtures(["a", "b", "a"]))
    with torch.no_grad():
        scores = head(items, points)
        head.items[0].bias.add_(2.5)  # type: ignore[operator, union-attr]
        torch.testing.assert_close(head(items, points + 2.5), scores)
    # At distance 0 the gradient is finite.
    at_home = torch.autograd.grad(head(items[:1], head.items(items[:1]).detach()).sum(), head.items[0].weight)[0]  # type: ignore[arg-type, union-attr]
    assert at_home.isfinite().all()


def test_the_smooth_hinge_joins_its_parts_and_ties_cost_nothing() -> None:
    for joint in (-4.0, 1.0):
        sides = torch.tensor([joint - 1e-4, joint + 1e-4]).double()
        left, right = (margin_loss(side[None], torch.ones(1).double(), "hinge_smooth") for side in sides)
        assert (left - right).abs().item() < 3e-4
    for kind in ("hinge", "hinge_smooth", "logistic"):
        tied = margin_loss(torch.tensor([3.0]), torch.tensor([0.5]), kind)  # type: ignore[arg-type]
        assert tied.item() == 0.0
        swapped = [margin_loss(torch.tensor([m]), torch.tensor([y]), kind) for m, y in ((0.3, 1.0), (-0.3, 0.0))]  # type: ignore[arg-type]
        assert swapped[0] == swapped[1]
    with pytest.raises(UserError, match="unknown loss of margins 'hinges': did you mean 'hinge'"):
        margin_loss(torch.zeros(1), torch.ones(1), "hinges")  # type: ignore[arg-type]


@pytest.mark.parametrize(("place", "distance"), [("f(P)w", "dist"), ("prompt", "angle")])
def test_a_saved_head_is_a_reward(place: str, distance: str, tmp_path: Path) -> None:
    config = PalConfig(64, width=8, place=place, distance=distance)  # type: ignore[arg-type]
    head = PalHead(config, ["anna", "berta"])
    save_pal(tmp_path, head, "tiny-pickscore")
    images = waves(2, 64, 64)
    anna, everyone = load_reward(f"pal@{tmp_path}#anna"), load_reward(f"pal@{tmp_path}")
    assert isinstance(everyone, PalReward)
    assert torch.equal(everyone.for_user("anna").score(images, PROMPTS), anna.score(images, PROMPTS))
    shares = head.mixtures(["berta"])[0].tolist()
    berta = everyone.for_user("berta").score(images, PROMPTS)
    torch.testing.assert_close(everyone.for_mixture(shares).score(images, PROMPTS), berta)
    assert not torch.equal(berta, anna.score(images, PROMPTS))
    low, high = anna.info.range
    assert ((berta >= low) & (berta <= high)).all()
    check_gradient(anna, images, step=1e-3)
    with pytest.raises(UserError, match="unknown user of PAL 'ana': did you mean 'anna'"):
        load_reward(f"pal@{tmp_path}#ana")
    with pytest.raises(UserError, match="2 shares of sum 1"):
        everyone.for_mixture([0.5, 0.6])


def test_folders_without_a_head_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no PAL head at .*: it has no pal\.json"):
        load_reward(f"pal@{tmp_path}")
    (tmp_path / "pal.json").write_text('{"config": {"dimensions": 3}}')
    with pytest.raises(UserError, match="does not describe a PAL head"):
        load_reward(f"pal@{tmp_path}")
    with pytest.raises(UserError, match=r"train_reward\.py --objective pal"):
        load_reward("pal")
