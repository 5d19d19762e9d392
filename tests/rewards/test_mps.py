"""MPS: a pickled module read without its code, the cross model against plain arithmetic, words that count."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from diffalign.errors import UserError
from diffalign.rewards.loading import load_reward
from diffalign.rewards.mps import CONDITION, HEAD_WIDTH, HEADS, Mps, MpsNetwork, relevant_words, rotated
from diffalign.rewards.open_clip_weights import clip_config
from diffalign.rewards.pickled_module import read_module
from tests.rewards.reference_towers import CONFIG
from tests.rewards.support import PROMPTS, check_gradient, waves


class Trap:
    """Would make a folder if a reader ran what the pickle names."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.folder,)


@pytest.fixture(scope="module")
def network() -> MpsNetwork:
    torch.manual_seed(0)
    network = MpsNetwork(clip_config(CONFIG)).eval()
    with torch.no_grad():
        network.model.text_projection.weight.mul_(5)
        network.model.visual_projection.weight.mul_(5)
    return network


@pytest.fixture(scope="module")
def checkpoint(network: MpsNetwork, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The module pickled whole, with the constants of the official one and something harmful."""
    folder = tmp_path_factory.mktemp("mps")
    first = network.cross_model["layers"][0]  # type: ignore[index]
    first[0].fn.norm.register_buffer("bias", torch.zeros(8))
    first[1].fn.register_buffer("pos_emb", torch.zeros(5, 64), persistent=False)
    network.trap = Trap(folder / "ran")  # type: ignore[assignment]
    torch.save(network, folder / "MPS_overall_checkpoint.pth")
    del network.trap, first[0].fn.norm.bias, first[1].fn.pos_emb
    return folder / "MPS_overall_checkpoint.pth"


def test_a_pickled_module_is_read_without_its_code(network: MpsNetwork, checkpoint: Path) -> None:
    state = read_module(checkpoint)
    assert not (checkpoint.parent / "ran").exists()
    for name, value in network.state_dict().items():
        assert torch.equal(state[name], value), name
    assert "cross_model.layers.0.0.fn.norm.bias" in state
    assert "cross_model.layers.3.1.fn.fused_attn_ff_proj.weight" in state


def plain_cross_model(state: dict[str, Tensor], x: Tensor, words: Tensor, seen: Tensor) -> Tensor:
    """The official arithmetic for one image and caption, head by head."""
    for layer in range(4):
        at = f"cross_model.layers.{layer}.0.fn."
        y = F.layer_norm(x, x.shape[-1:]) * state[f"{at}norm.weight"]
        keys, values = (words @ state[f"{at}to_kv.weight"].T).split(HEAD_WIDTH, dim=-1)
        heads = []
        for q in (y @ state[f"{at}to_q.weight"].T).split(HEAD_WIDTH, dim=-1):
            logits = (q / 8) @ keys.T
            heads.append(logits.masked_fill(~seen, float("-inf")).softmax(-1) @ values)
        a, b = (y @ state[f"{at}ff.0.weight"].T).chunk(2, dim=-1)
        x = x + torch.cat(heads, -1) @ state[f"{at}to_out.weight"].T + (F.silu(b) * a) @ state[f"{at}ff.2.weight"].T
        at = f"cross_model.layers.{layer}.1.fn."
        y = F.layer_norm(x, x.shape[-1:]) * state[f"{at}norm.weight"]
        q, k, v, inner = (y @ state[f"{at}fused_attn_ff_proj.weight"].T).split([HEADS * 64, 64, 64, 64], dim=-1)
        k, heads = turned(k), []
        for part in q.split(HEAD_WIDTH, dim=-1):
            heads.append((turned(part) @ k.T / 8).softmax(-1) @ v)
        a, b = inner.chunk(2, dim=-1)
        fed = (F.silu(b) * a) @ state[f"{at}ff_out.1.weight"].T
        x = x + torch.cat(heads, -1) @ state[f"{at}attn_out.weight"].T + fed
    return x


def turned(x: Tensor) -> Tensor:
    """Rotary positions by complex numbers."""
    half = x.shape[-1] // 2
    angles = torch.outer(torch.arange(len(x)).double(), 10000 ** (-torch.arange(half).double() / half))
    turned = torch.complex(x[:, :half].double(), x[:, half:].double()) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([turned.real, turned.imag], dim=-1).to(x.dtype)


def test_scores_are_those_of_plain_arithmetic(network: MpsNetwork, checkpoint: Path) -> None:
    reward = Mps.load(str(checkpoint), config=CONFIG)
    images, state = waves(2, 16, 16), network.state_dict()
    tokens = reward.tokenizer([*PROMPTS, CONDITION], padding="max_length", truncation=True, return_tensors="pt")
    with torch.no_grad():
        words, texts = network.words(tokens.input_ids)
        seen = network.model.vision_model(pixel_values=reward.preprocess(images)).last_hidden_state
        want = []
        for row in range(2):
            likeness = (words[row] @ words[2].T).max(-1).values
            said = plain_cross_model(
                state, network.model.visual_projection(seen[row]), words[row], likeness / likeness.max() > 0.3
            )
            want.append(F.cosine_similarity(said[0], texts[row], dim=0) * state["model.logit_scale"].exp())
    torch.testing.assert_close(reward.score(images, PROMPTS), torch.stack(want), atol=2e-4, rtol=1e-4)
    one_by_one = [reward.score(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(torch.cat(one_by_one), reward.score(images, PROMPTS), atol=2e-4, rtol=1e-4)
    check_gradient(reward, images, step=1e-3)


def test_rotary_positions_turn_pairs() -> None:
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(rotated(x), turned(x))
    torch.testing.assert_close(rotated(x).norm(dim=-1), x.norm(dim=-1))


def test_words_count_by_their_likeness_to_the_dimension() -> None:
    words = torch.tensor([[[1.0, 0.0], [0.2, 0.0], [0.0, 0.9]], [[0.1, 0.0], [0.01, 0.0], [-1.0, 0.0]]])
    condition = torch.tensor([[1.0, 0.0], [0.0, 0.5]])
    assert relevant_words(words, condition).tolist() == [[True, False, True], [True, False, False]]


def test_files_that_are_no_such_module(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"github\.com/Kwai-Kolors/MPS"):
        load_reward("mps")
    with pytest.raises(UserError, match="not a checkpoint of this scorer"):
        load_reward(f"mps@{checkpoint}")
    torch.save(Trap(tmp_path / "ran"), tmp_path / "trap.pth")
    with pytest.raises(UserError, match="holds no module"):
        read_module(tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "odd.pth").write_bytes(b"odd")
    with pytest.raises(UserError, match="is not a file of torch"):
        read_module(tmp_path / "odd.pth")
