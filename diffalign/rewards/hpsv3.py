"""HPSv3 (Ma et al., arXiv 2508.03789; official code MizzenAI/HPSv3, MIT): Qwen2-VL with a head of two numbers.

The model reads the picture, a long instruction with the caption, and a token of its own, ``<|Reward|>``; the head turns
that token's last state into the mean and the logarithm of the standard deviation of the score. The mean is reported.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from diffalign.errors import UserError
from diffalign.rewards.base import Metadata, Reward, RewardInfo
from diffalign.rewards.checkpoints import load_strictly, read_state
from diffalign.rewards.hub import checkpoint_file, pretrained
from diffalign.rewards.preprocess import CLIP_MEAN, CLIP_STD, normalise, resized_as_by_pil, to_tensor
from diffalign.rewards.registry import LoadOptions, register
from diffalign.rewards.weights import weights_file

OFFICIAL = "MizzenAI/HPSv3/HPSv3.safetensors"
BASE = "Qwen/Qwen2-VL-7B-Instruct"
REWARD_TOKEN = "<|Reward|>"
PIXELS = 256 * 28 * 28
"""Both the least and the greatest number of pixels that a picture is brought to."""
_SYSTEM = "You are a helpful assistant."
_NAMES = (
    (r"^model\.visual\.", "visual."),
    (r"^model\.language_model\.", "language_model."),
    (r"^model\.", "language_model."),
)
"""Names of the tensors before and after transformers 4.52 -> ours."""


class HPSv3Network(nn.Module):
    """The model with its head; parameters are called as in transformers' ``Qwen2VLModel``, and ``rm_head``.

    Args:
        config: transformers' ``Qwen2VLConfig``.
    """

    def __init__(self, config: Any) -> None:
        from transformers import Qwen2VLModel

        super().__init__()
        self.config = config
        base = Qwen2VLModel(config)
        self.visual: nn.Module = base.visual
        self.language_model: nn.Module = base.language_model
        width = config.text_config.hidden_size
        self.rm_head = nn.Sequential(
            nn.Linear(width, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
        )

    def forward(self, patches: Tensor, grids: Tensor, input_ids: Tensor, attention_mask: Tensor, reward: int) -> Tensor:
        """Return means and logarithms of standard deviations, (batch, 2) float32.

        Args:
            patches: of all pictures one after the other, (patches, 3 * 2 * 14 * 14).
            grids: (batch, 3) frames, rows and columns of patches of each picture.
            input_ids, attention_mask: (batch, length), padded on the right.
            reward: id of the token whose state is read.
        """
        words = self.language_model.get_input_embeddings()(input_ids)  # type: ignore[operator]
        seen = self.visual(patches.to(words.dtype), grid_thw=grids).pooler_output
        places = (input_ids == self.config.image_token_id)[..., None]
        length = input_ids.shape[1]
        # The official model numbers all tokens one after the other, those of pictures too.
        positions = torch.arange(length, device=input_ids.device).expand(3, len(input_ids), length)
        states = self.language_model(
            inputs_embeds=words.masked_scatter(places, seen.to(words.dtype)),
            attention_mask=attention_mask,
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        read = states[input_ids == reward]  # (batch, width)
        return self.rm_head(read.to(self.rm_head[0].weight.dtype))


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a checkpoint; the language head, which is not used, is left out."""
    result = {}
    for name, value in state.items():
        if name.startswith("lm_head."):
            continue
        for pattern, replacement in _NAMES:
            name, found = re.subn(pattern, replacement, name)
            if found:
                break
        result[name] = value
    return result


def official_wording() -> tuple[str, str]:
    """Return the official instruction, with ``{text_prompt}``, and what follows it, from the package hpsv3.

    Raises:
        UserError: if the package is neither installed nor in the weights folder.
    """
    tree = ast.parse(weights_file("hpsv3-instruction").read_text(encoding="utf-8"))
    texts = {
        node.targets[0].id: node.value.value
        for node in tree.body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
    }
    return str(texts["INSTRUCTION"]), str(texts["prompt_with_special_token"])


class HPSv3(Reward):
    """Mean of the score; build it with :meth:`load`.

    Args:
        network: kept frozen.
        tokenizer: Qwen2-VL's, with the reward token.
        wording: the instruction, with ``{text_prompt}``, and what follows it.
    """

    def __init__(self, network: HPSv3Network, tokenizer: Any, wording: tuple[str, str]) -> None:
        self.network, self.tokenizer, self.wording = network.requires_grad_(False).eval(), tokenizer, wording
        self.reward_id = tokenizer.convert_tokens_to_ids(REWARD_TOKEN)
        self.info = RewardInfo(
            "hpsv3", "mean of the score; about 0 to 12", (-math.inf, math.inf), differentiable=True, licence="MIT"
        )

    @classmethod
    def load(
        cls,
        source: str = OFFICIAL,
        base: str = BASE,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        wording: tuple[str, str] | None = None,
    ) -> HPSv3:
        """Load an official checkpoint.

        Args:
            source: checkpoint file, or USER/REPOSITORY/FILE on the hub.
            base: configuration and tokenizer of the model that was fine-tuned, by hub name or local folder.
            device, dtype: where and how the model runs; the head runs in float32.
            wording: see the class; the official one by default.

        Raises:
            UserError: if the file or the instruction is absent, or the checkpoint of another architecture.
        """
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoTokenizer

        wording = wording or official_wording()
        path = checkpoint_file(source)
        state = translate(read_state(path))
        with pretrained("the tokenizer and configuration", base):
            tokenizer = AutoTokenizer.from_pretrained(base)
            config = AutoConfig.from_pretrained(base)
        tokenizer.add_special_tokens({"additional_special_tokens": [REWARD_TOKEN]})
        # The embeddings were cut to the tokenizer's length when the reward token came.
        config.text_config.vocab_size = len(tokenizer)
        with init_empty_weights():  # Seven billion random numbers would take minutes; constants are computed.
            network = HPSv3Network(config)
        load_strictly(network, state, str(path))
        network.to(device)
        network.visual.to(dtype)
        network.language_model.to(dtype)
        network.rm_head.float()
        return cls(network, tokenizer, wording)

    def score(self, images: Tensor, prompts: Sequence[str], metadata: Metadata | None = None) -> Tensor:
        """Return means, (batch,), of images (batch, 3, height, width) in [0, 1]."""
        return self.distributions(images, prompts)[:, 0]

    def score_pictures(
        self, pictures: Sequence[Image.Image], prompts: Sequence[str], metadata: Metadata | None = None
    ) -> Tensor:
        """Score pictures of any sizes through the official preprocessing, (batch,)."""
        images = []
        for picture in pictures:
            height, width = fitted_size(picture.height, picture.width, self._multiple)
            images.append(to_tensor(picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)))
        return self._read(images, prompts)[:, 0]

    def distributions(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Return mean and logarithm of the standard deviation of each score, (batch, 2)."""
        size = fitted_size(images.shape[-2], images.shape[-1], self._multiple)
        return self._read(list(resized_as_by_pil(images, size)), prompts)

    @property
    def _multiple(self) -> int:
        vision = self.network.config.vision_config
        return int(vision.patch_size * vision.spatial_merge_size)

    def _read(self, images: Sequence[Tensor], prompts: Sequence[str]) -> Tensor:
        vision = self.network.config.vision_config
        parts = [
            patchify(image, vision.patch_size, vision.spatial_merge_size, vision.temporal_patch_size)
            for image in images
        ]
        place = next(self.network.parameters()).device
        grids = torch.tensor([grid for _, grid in parts], device=place)
        texts = [
            self._text(prompt, grid[1] * grid[2] // vision.spatial_merge_size**2)
            for prompt, (_, grid) in zip(prompts, parts, strict=True)
        ]
        self.tokenizer.padding_side = "right"
        tokens = self.tokenizer(texts, padding=True, return_tensors="pt").to(place)
        patches = torch.cat([patches for patches, _ in parts]).to(place)
        result: Tensor = self.network(patches, grids, tokens.input_ids, tokens.attention_mask, self.reward_id)
        return result

    def _text(self, prompt: str, picture_tokens: int) -> str:
        """One user turn in Qwen2-VL's chat format: the picture, then instruction and caption."""
        instruction, closing = self.wording
        picture = "<|vision_start|>" + "<|image_pad|>" * picture_tokens + "<|vision_end|>"
        asked = instruction.replace("{text_prompt}", prompt.replace(REWARD_TOKEN, "")) + closing
        return (
            f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n"
            f"<|im_start|>user\n{picture}{asked}<|im_end|>\n<|im_start|>assistant\n"
        )


def fitted_size(height: int, width: int, multiple: int, pixels: int = PIXELS) -> tuple[int, int]:
    """Return the size of about ``pixels`` pixels with sides that are multiples, as Qwen2-VL chooses it.

    Raises:
        UserError: for an image 200 times as long as wide.
    """
    if max(height, width) > 200 * min(height, width):
        raise UserError(f"an image of {width} x {height} is too long for HPSv3; one side may be 200 times the other")
    rounded = round(height / multiple) * multiple, round(width / multiple) * multiple
    scale = math.sqrt(height * width / pixels)
    if rounded[0] * rounded[1] > pixels:
        return (
            max(multiple, math.floor(height / scale / multiple) * multiple),
            max(multiple, math.floor(width / scale / multiple) * multiple),
        )
    if rounded[0] * rounded[1] < pixels:
        return (
            math.ceil(height / scale / multiple) * multiple,
            math.ceil(width / scale / multiple) * multiple,
        )
    return rounded


def patchify(image: Tensor, side: int, merged: int, frames: int) -> tuple[Tensor, list[int]]:
    """Cut an image (3, height, width) in [0, 1] into patches as Qwen2-VL's vision tower reads them.

    Args:
        image: with sides that are multiples of ``side * merged``.
        side: of a patch.
        merged: patches along each side of a group that becomes one token; groups lie one after the other.
        frames: times a picture is repeated, as if it were a film.

    Returns:
        (patches, 3 * frames * side * side), and the grid: 1, rows, columns.
    """
    rows, columns = image.shape[1] // side, image.shape[2] // side
    blocks = normalise(image, CLIP_MEAN, CLIP_STD).reshape(
        3, rows // merged, merged, side, columns // merged, merged, side
    )
    patches = blocks.permute(1, 4, 2, 5, 0, 3, 6)  # (rows, columns) of groups, of patches in them, 3, side, side
    patches = patches[..., None, :, :].expand(*patches.shape[:5], frames, side, side)
    return patches.reshape(rows * columns, 3 * frames * side * side), [1, rows, columns]


@register("hpsv3", summary="human preference by Qwen2-VL-7B with a head", paper="arXiv 2508.03789", large=True)
def _load(options: LoadOptions) -> Reward:
    return HPSv3.load(options.source or OFFICIAL, device=options.device, dtype=options.dtype)
