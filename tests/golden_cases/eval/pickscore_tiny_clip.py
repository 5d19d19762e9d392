"""PickScore with a tiny CLIPModel whose weights follow a formula."""

from __future__ import annotations

import math
import re
from typing import Any

import torch

from diffalign.rewards.clip_model import ClipTowers, projected
from diffalign.rewards.pickscore import PickScore
from diffalign.rewards.preprocess import ClipPreprocess
from tests.golden_cases.base import GoldenCase
from tests.golden_cases.eval.formula import wave

PIXELS = re.compile(r"flat\[k\]=sin\(0\.0137\*k\+s\) float64 shape \(B,3,(\d+),(\d+)\)")
WEIGHTS = (
    "index i in the sorted parameter names: matrices/tensors flat[k]=sin(0.731k+0.37i+s)*1.5/sqrt(numel of one "
    "output row); 1-d: 0.1*sin(...), but 1+0.1*sin(...) for weights whose name contains norm; "
    "logit_scale = ln(logit_scale_exp)"
)
TEXT_KEYS = {
    r"vocab (\d+)": "vocab_size",
    r"(\d+) positions": "max_position_embeddings",
    r"bos (\d+)": "bos_token_id",
    r"eos (\d+)": "eos_token_id",
    r"pad (\d+)": "pad_token_id",
}
VISION_KEYS = {r"image (\d+)": "image_size", r"patch (\d+)": "patch_size"}
TOWER_KEYS = {
    r"hidden (\d+)": "hidden_size",
    r"ffn (\d+)": "intermediate_size",
    r"(\d+) layers": "num_hidden_layers",
    r"(\d+) heads": "num_attention_heads",
    r"(gelu)": "hidden_act",
}

CONFIG = {"projection_dim": None, "text": str, "vision": str}


def run(case: GoldenCase) -> dict[str, Any]:
    names = {"s": None, "B": None, "logit_scale_exp": None, "config": CONFIG, "parameter_names_sorted": str}
    case.known({"input_ids", "attention_mask", "pixel_values_formula"}, {**names, "weight_formula": {WEIGHTS}})
    model = _model(case)
    towers = ClipTowers(model, tokenizer=None)
    found = PIXELS.fullmatch(case.inputs["pixel_values_formula"])
    assert found, "an unknown formula of pixels"
    side = int(found[1])
    pixels = wave((case.params["B"], 3, side, side), 0.0137, case.params["s"])
    tokens = case.integers("input_ids"), case.integers("attention_mask")
    scorer = PickScore(towers, ClipPreprocess(side))
    scores = scorer.logits(towers.image(pixels), towers.tokens(*tokens))
    return {
        "image_embeds_unnormalised": projected(model.get_image_features(pixel_values=pixels)),
        "text_embeds_unnormalised": projected(model.get_text_features(*tokens)),
        "pickscore_row_per_prompt": scores,
        "pickscore_over_logit_scale": scores / towers.logit_scale,
        "probs_per_prompt": scores.softmax(-1),
    }


def _model(case: GoldenCase) -> Any:
    from transformers import CLIPConfig, CLIPModel

    stated = case.params["config"]
    config = CLIPConfig(
        projection_dim=stated["projection_dim"],
        text_config=_read(stated["text"], {**TOWER_KEYS, **TEXT_KEYS}),
        vision_config=_read(stated["vision"], {**TOWER_KEYS, **VISION_KEYS}),
    )
    model = CLIPModel(config).double()
    parameters = dict(model.named_parameters())
    assert sorted(parameters) == case.params["parameter_names_sorted"]
    shift = case.params["s"]
    with torch.no_grad():
        for index, name in enumerate(sorted(parameters)):
            value = parameters[name]
            values = wave(value.shape or (1,), 0.731, 0.37 * index + shift).view(value.shape)
            if name == "logit_scale":
                value.fill_(math.log(case.params["logit_scale_exp"]))
            elif value.dim() > 1:
                value.copy_(values * 1.5 / math.sqrt(value[0].numel()))
            else:
                value.copy_(0.1 * values + float("norm" in name and name.endswith("weight")))
    return model


def _read(text: str, keys: dict[str, str]) -> dict[str, Any]:
    values = {}
    for part in text.split(", "):
        matches = {key: found[1] for pattern, key in keys.items() if (found := re.fullmatch(pattern, part))}
        assert len(matches) == 1, f"unknown part of a configuration: {part!r}"
        values |= {key: int(value) if value.isdigit() else value for key, value in matches.items()}
    return values
