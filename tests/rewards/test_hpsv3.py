"""HPSv3: the official layout at small width, its pooling, preprocessing and wording."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffalign.errors import UserError
from diffalign.rewards.hpsv3 import REWARD_TOKEN, HPSv3, HPSv3Network, fitted_size, official_wording, patchify
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD
from tests.rewards.support import PROMPTS, check_gradient, waves

WORDING = ("judge this picture of {text_prompt}", f" rate {REWARD_TOKEN} END")
WORDS = ["<pad>", "<unk>", "judge", "this", "picture", "of", "a", "photo", "red", "two", "circle", "rate", "END"]
MARKS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Configuration and tokenizer of a tiny Qwen2-VL."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

    folder = tmp_path_factory.mktemp("qwen")
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS + MARKS)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>")
    tokenizer.add_special_tokens({"additional_special_tokens": MARKS})
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Qwen2VLConfig(
        text_config={
            **sizes,
            "num_key_value_heads": 2,
            "vocab_size": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
        },
        vision_config={"embed_dim": 16, "depth": 2, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2},
        image_token_id=(WORDS + MARKS).index("<|image_pad|>"),
    )
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def checkpoint(base: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint under the official names."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(base)
    config.text_config.vocab_size = len(WORDS + MARKS) + 1
    torch.manual_seed(0)
    state = HPSv3Network(config).state_dict()
    names = {name: name.replace("language_model.", "model.") for name in state}
    official = {names[name]: (value * 3 if "rm_head" in name else value).contiguous() for name, value in state.items()}
    path = tmp_path_factory.mktemp("hpsv3") / "HPSv3.safetensors"
    save_file(official | {"lm_head.weight": torch.zeros(2, 2)}, path)
    return str(path)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pictures of 56 x 56 pixels instead of 448 x 448."""
    monkeypatch.setattr("diffalign.rewards.hpsv3.fitted_size", lambda height, width, multiple: (56, 56))


@pytest.mark.usefixtures("small")
def test_the_official_layout_scores_and_has_a_gradient(base: str, checkpoint: str) -> None:
    reward = HPSv3.load(checkpoint, base, wording=WORDING)
    images = waves(2, 64, 48)
    numbers = reward.distributions(images, PROMPTS)
    assert numbers.shape == (2, 2)
    assert torch.equal(reward.score(images, PROMPTS), numbers[:, 0])
    assert not torch.equal(reward.score(images, PROMPTS[::-1]), numbers[:, 0])
    # The captions differ in length: padding must not move the token that is read.
    alone = torch.cat([reward.distributions(images[i : i + 1], PROMPTS[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(alone, numbers, atol=1e-5, rtol=1e-4)
    check_gradient(reward, images, step=1e-3)


@pytest.mark.usefixtures("small")
def test_names_of_newer_checkpoints_are_read_and_wrong_ones_refused(base: str, checkpoint: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    state = load_file(checkpoint)
    newer = {
        (f"model.{k}" if k.startswith("visual.") else k.replace("model.", "model.language_model.", 1)): v
        for k, v in state.items()
    }
    save_file(newer, tmp_path / "newer.safetensors")
    images = waves(1, 56, 56)
    old, new = (HPSv3.load(str(p), base, wording=WORDING) for p in (checkpoint, tmp_path / "newer.safetensors"))
    assert torch.equal(old.score(images, PROMPTS[:1]), new.score(images, PROMPTS[:1]))
    del state["rm_head.5.bias"]
    state["rm_head.0.weight"] = torch.zeros(1024, 3584)
    save_file(state, tmp_path / "wrong.safetensors")
    message = r"1 missing \(rm_head\.5\.bias\).*rm_head\.0\.weight is \(1024, 3584\), expected \(1024, 32\)"
    with pytest.raises(UserError, match=message):
        HPSv3.load(str(tmp_path / "wrong.safetensors"), base, wording=WORDING)


def test_patches_are_those_of_the_models_own_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    (image,) = (waves(1, 56, 84) * 255).round().to(torch.uint8)
    processor = Qwen2VLImageProcessorPil(do_resize=False, image_mean=CLIP_MEAN, image_std=CLIP_STD)
    want = processor(images=[image.permute(1, 2, 0).numpy()], return_tensors="pt")
    patches, grid = patchify(image.float() / 255, 14, 2, 2)
    torch.testing.assert_close(patches, want["pixel_values"], atol=1e-5, rtol=1e-5)
    assert want["image_grid_thw"].tolist() == [grid]


def test_sizes_are_those_of_the_models_own_processor() -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

    for size in ((512, 512), (300, 451), (64, 64), (1024, 100), (448, 448), (2000, 1500), (30, 700)):
        assert fitted_size(*size, 28) == smart_resize(*size, 28, 200704, 200704)
    with pytest.raises(UserError, match="too long"):
        fitted_size(10, 4000, 28)


@pytest.mark.weights
def test_the_official_instruction_is_read_without_running_the_package() -> None:
    instruction, closing = official_wording()
    assert instruction.count("{text_prompt}") == 1
    assert "Visual Quality" in instruction
    assert REWARD_TOKEN in closing
