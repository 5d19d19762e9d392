"""Names of LoRA weights as kohya's sd-scripts write them, which ComfyUI, A1111 and diffusers read.

A layer is ``lora_unet_`` and its path with underscores, with ``lora_down`` and ``lora_up`` for the factors and
``alpha`` for the numerator of the scale. For Stable Diffusion 1.x and 2.x the path is that of diffusers' UNet. For XL
it is that of the original network, which sd-scripts train: blocks are numbered through, and layers inside a residual
block are numbers. (diffusers' ``convert_state_dict_to_kohya`` writes its own paths for XL too, and the rank for alpha.)
For Stable Diffusion 3 there is no agreement: sd-scripts name layers that hold queries, keys and values together.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError
from diffalign.policies.saving import LoraWeights

_FACTORS = {"lora_A": "lora_down", "lora_B": "lora_up"}
_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
_VERSIONS = {768: "sd_v1", 1024: "sd_v2"}


@dataclass(frozen=True)
class KohyaNames:
    """How a UNet's layers are called.

    Args:
        config: the UNet's, as diffusers stores it.
        xl: whether the pipeline is Stable Diffusion XL's.
    """

    config: Mapping[str, Any]
    xl: bool

    def name(self, path: str) -> str:
        """Return the name of a layer, given by its path in diffusers' UNet."""
        return "lora_unet_" + (self._original(path) if self.xl else path).replace(".", "_")

    @property
    def version(self) -> str:
        """What sd-scripts call the base model; empty where they have no name for it."""
        return "sdxl_base_v1-0" if self.xl else _VERSIONS.get(self.config["cross_attention_dim"], "")

    def _original(self, path: str) -> str:
        """Return the path in Stability's own network.

        Raises:
            UserError: for layers that it does not have under another name.
        """
        if path in _OUTSIDE:
            return _OUTSIDE[path]
        middle = re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", path)
        if middle:
            kind, index, rest = middle.groups()
            return (
                f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * int(index)}.{_RESNET[rest]}"
            )
        outer = re.fullmatch(r"(down|up)_blocks\.(\d+)\.(\w+)\.(\d+)\.(.+)", path)
        if outer is None:
            raise UserError(f"kohya's format has no name for the layer {path}: export with --format diffusers")
        side, block, kind, index, rest = outer[1], int(outer[2]), outer[3], int(outer[4]), outer[5]
        # A block of the decoder has one layer more, one of the encoder a downsampler.
        width = self.config["layers_per_block"] + 1
        if kind == "downsamplers":
            return f"input_blocks.{(block + 1) * width}.0.op"
        if kind == "upsamplers":
            layer = 2 if "CrossAttn" in self.config["up_block_types"][block] else 1
            return f"output_blocks.{(block + 1) * width - 1}.{layer}.{rest}"
        place = block * width + index
        row = f"input_blocks.{place + 1}" if side == "down" else f"output_blocks.{place}"
        return f"{row}.0.{_RESNET[rest]}" if kind == "resnets" else f"{row}.1.{rest}"


def kohya_state(weights: LoraWeights, names: KohyaNames) -> dict[str, Tensor]:
    """Return an adapter's tensors under kohya's names, with one alpha a layer."""
    state: dict[str, Tensor] = {}
    for key, value in weights.state.items():
        path, factor = re.fullmatch(r"(.+)\.(lora_[AB])\.weight", key).groups()  # type: ignore[union-attr]  # read_lora checks
        name = names.name(path)
        state[f"{name}.{_FACTORS[factor]}.weight"] = value.contiguous()
        state[f"{name}.alpha"] = torch.tensor(float(weights.settings.scale_numerator))
    return state


def kohya_header(weights: LoraWeights, names: KohyaNames) -> dict[str, str]:
    """Return what other programs look for in the header of a file."""
    version = {"ss_base_model_version": names.version} if names.version else {}
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(weights.settings.rank),
        "ss_network_alpha": str(float(weights.settings.scale_numerator)),
        **version,
    }
