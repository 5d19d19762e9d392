"""Checkpoints in open_clip's format, read into transformers' ``CLIPModel``.

open_clip itself imports torchvision, which is not installed everywhere diffalign is; its towers are the same
networks. Architectures are read from the model configurations in open_clip's installed package, without importing it,
and so is the vocabulary of its tokenizer.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.errors import UserError, unknown
from diffalign.rewards.checkpoints import load_strictly

_MERGES = 49152 - 256 - 2
"""Merges of CLIP's byte-pair encoding that open_clip's tokenizer uses."""


def _package() -> Path:
    spec = importlib.util.find_spec("open_clip")
    if spec is None or spec.origin is None:
        raise UserError("the package open_clip_torch is not installed; install it with: pip install open_clip_torch")
    return Path(spec.origin).parent


def architecture(name: str) -> dict[str, Any]:
    """Read the configuration of an architecture such as "ViT-H-14".

    Raises:
        UserError: if open_clip knows none of that name.
    """
    folder = _package() / "model_configs"
    path = folder / f"{name}.json"
    if not path.is_file():
        raise unknown("open_clip architecture", name, [file.stem for file in folder.glob("*.json")])
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return config


def clip_config(config: Mapping[str, Any]) -> Any:
    """Translate open_clip's configuration of a plain ViT with a causal text tower into a ``CLIPConfig``."""
    from transformers import CLIPConfig

    vision, text = config["vision_cfg"], config["text_cfg"]
    activation = "quick_gelu" if config.get("quick_gelu") else "gelu"
    vocabulary = text["vocab_size"]
    return CLIPConfig(
        projection_dim=config["embed_dim"],
        vision_config={
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
            "hidden_size": vision["width"],
            "intermediate_size": int(vision["width"] * vision.get("mlp_ratio", 4)),
            "num_hidden_layers": vision["layers"],
            "num_attention_heads": vision["width"] // vision.get("head_width", 64),
            "hidden_act": activation,
            "projection_dim": config["embed_dim"],
        },
        text_config={
            "vocab_size": vocabulary,
            "max_position_embeddings": text["context_length"],
            "hidden_size": text["width"],
            "intermediate_size": text["width"] * 4,
            "num_hidden_layers": text["layers"],
            "num_attention_heads": text["heads"],
            "hidden_act": activation,
            "projection_dim": config["embed_dim"],
            "bos_token_id": vocabulary - 2,
            "eos_token_id": vocabulary - 1,
            "pad_token_id": 0,
        },
    )


_OUTER = {
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "token_embedding": "text_model.embeddings.token_embedding",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final": "text_model.final_layer_norm",
}
_BLOCK = {
    "attn.out_proj": "self_attn.out_proj",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def translate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of an open_clip state to those of ``CLIPModel``; unknown names stay as they are."""
    result: dict[str, Tensor] = {}
    for name, value in state.items():
        name = name.removeprefix("module.")
        tower, found, rest = name.partition("transformer.resblocks.")
        if name == "visual.proj":
            result["visual_projection.weight"] = value.T
        elif name == "text_projection":
            result["text_projection.weight"] = value.T
        elif name == "attn_mask":
            continue  # A constant of the causal tower.
        elif found and tower in ("", "visual."):
            number, _, inner = rest.partition(".")
            prefix = f"{'vision' if tower else 'text'}_model.encoder.layers.{number}."
            if inner.startswith("attn.in_proj_"):
                parts = value.chunk(3)
                kind = inner.removeprefix("attn.in_proj_")
                result |= {f"{prefix}self_attn.{p}_proj.{kind}": v for p, v in zip("qkv", parts, strict=True)}
            else:
                result[prefix + _renamed(inner, _BLOCK)] = value
        else:
            result[_renamed(name, _OUTER)] = value
    return result


def _renamed(name: str, table: Mapping[str, str]) -> str:
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name[len(old) :]
    return name


def clip_from_state(state: Mapping[str, Tensor], config: Mapping[str, Any], where: str) -> Any:
    """Build a ``CLIPModel`` from an open_clip state.

    Args:
        state: names as open_clip saves them.
        config: the architecture, see :func:`architecture`.
        where: the checkpoint's name in errors.

    Raises:
        UserError: if names or shapes do not belong to that architecture.
    """
    from transformers import CLIPModel

    with torch.device("meta"):
        model: Any = CLIPModel(clip_config(config))
    translated = translate(state)
    for tower in ("vision_model", "text_model"):
        embeddings = getattr(model, tower).embeddings
        # Constants that meta construction leaves empty.
        embeddings.position_ids = torch.arange(embeddings.position_ids.shape[-1])[None]
    load_strictly(model, translated, where)
    return model


def clip_tokenizer() -> Any:
    """Build CLIP's tokenizer (49,408 tokens, 77 a caption) from open_clip's vocabulary file.

    It pads with the end token where open_clip pads with zeros: the text tower is causal and pools at the first end
    token, so that nothing after it is seen.
    """
    from transformers import CLIPTokenizer

    lines = gzip.decompress((_package() / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode().split("\n")
    merges = lines[1 : 1 + _MERGES]
    pairs: Any = [tuple(merge.split()) for merge in merges]  # Typed as text in transformers, which takes pairs.
    alphabet = _byte_alphabet()
    words = [*alphabet, *(letter + "</w>" for letter in alphabet), *("".join(pair) for pair in pairs)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=pairs,
        model_max_length=77,
    )


def _byte_alphabet() -> list[str]:
    """One printable character for each byte, in the order of byte-level byte-pair encodings."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]
