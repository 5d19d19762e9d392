"""Heads of users over CLIP embeddings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.heads import HeadReward
from diffalign.rewards.loading import load_reward
from tests.rewards.support import PROMPTS, check_gradient, waves


def folder(path: Path, state: dict[str, Tensor], **description: object) -> str:
    path.mkdir(exist_ok=True)
    save_file(state, path / "head.safetensors")
    (path / "head.json").write_text(json.dumps({"backbone": "tiny-pickscore", **description}))
    return f"mlp_head@{path}"


def test_a_sequential_of_torch_becomes_a_reward(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 32), nn.GELU(), nn.Dropout(0.1), nn.Linear(32, 1)).eval()
    state = {f"net.{name}": value for name, value in net.state_dict().items()}
    name = folder(tmp_path / "mine", state, activation="gelu", unit="stars", range=[0, 5], licence="mine")
    reward = load_reward(name)
    assert isinstance(reward, HeadReward)
    assert (reward.info.name, reward.info.unit, reward.info.range) == ("mine", "stars", (0.0, 5.0))
    images = waves(2, 64, 64)
    with torch.no_grad():
        want = net(reward.towers.image(reward.preprocess(images))).squeeze(-1)
    torch.testing.assert_close(reward.score(images, PROMPTS), want)
    check_gradient(reward, images, step=1e-3)


@pytest.mark.parametrize(
    ("state", "description", "message"),
    [
        (
            {"0.weight": torch.zeros(1, 48), "0.bias": torch.zeros(1)},
            {},
            "of 48 numbers, but those of tiny-pickscore have 64",
        ),
        ({"0.weight": torch.zeros(2, 64), "0.bias": torch.zeros(2)}, {}, r"the widths \[64, 2\]"),
        ({"0.weight": torch.zeros(1, 64)}, {}, r"1 missing \(layers\.0\.bias\)"),
        ({"scale": torch.zeros(1)}, {}, r"a tensor 'scale'; expected N\.weight"),
        ({"0.bias": torch.zeros(1)}, {}, "not every one has a weight"),
        ({"0.weight": torch.zeros(1, 64), "0.bias": torch.zeros(1)}, {"activation": "rleu"}, "did you mean 'relu'"),
        ({"0.weight": torch.zeros(1, 64), "0.bias": torch.zeros(1)}, {"range": 3}, "range of two numbers"),
    ],
)
def test_heads_that_will_not_do(
    state: dict[str, Tensor], description: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        load_reward(folder(tmp_path, state, **description))


def test_folders_that_are_no_head(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"it has no head\.json"):
        load_reward(f"mlp_head@{tmp_path}")
    with pytest.raises(UserError, match="write 'mlp_head@FOLDER'"):
        load_reward("mlp_head")
