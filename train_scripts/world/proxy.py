"""Stages "proxy" and "proxy-pairs": tiny-pickscore, a small CLIPModel made in two steps as PickScore was.

1. Contrastive, on renderings: a caption must find its true picture among those of other captions, one with a fact
   changed and one with deformed shapes; a picture must find its caption among those of others and some with a word
   changed. The vision tower also learns, through a head that is thrown away, which object
   lies under each patch: that makes minutes do for hours.
2. PickScore's objective, on pairs sampled from tiny-sd for training captions: a softmax over the two logits, the
   picture with the higher graded verifier score preferred.

It stays a proxy: it can be fooled, and the verifier shows when it was.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from diffalign.rewards.objective import pair_logits, preference_cross_entropy
from diffalign.world.grammar import COLORS, SHAPES, PromptRecord, draw_prompt
from diffalign.world.render import SIDE, Placed, arrange, draw_scene, render
from diffalign.world.verifier import verify
from train_scripts.world import samples
from train_scripts.world.export import save_half
from train_scripts.world.fitting import FitSettings, fit
from train_scripts.world.pictures import to_pictures, to_tensor
from train_scripts.world.spoiled import Picture, spoil_caption, spoil_meaning, spoil_picture
from train_scripts.world.text import build_tokenizer, text_config
from train_scripts.world.workspace import Workspace

NAME = "tiny-pickscore"
CONTRASTIVE = FitSettings(steps=4500, learning_rate=1e-3, warmup=200, ema_decay=0.995, seed=5)
PAIRS = FitSettings(steps=300, learning_rate=2e-4, warmup=30, ema_decay=0.99, seed=6)
CAPTIONS = 32
WRONG_CAPTIONS = 3
"""Captions with a word changed, for each true one."""
SAMPLED, RENDERED = 32, 12
"""Pairs of each kind in a batch of the second step."""
PATCH = 8
VISION_WIDTH = 128
MEAN = STD = (0.5, 0.5, 0.5)
"""Normalised pixels are those in [-1, 1]."""
MAX_LOGIT_SCALE = math.log(100.0)


def build_proxy(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Make the model, untrained: 0.9M parameters."""
    vision = {
        "hidden_size": VISION_WIDTH,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": PATCH,
        "hidden_act": "gelu",
    }
    config = CLIPConfig(text_config=text_config(tokenizer, 96).to_dict(), vision_config=vision, projection_dim=64)
    return CLIPModel(config)


class Scorer:
    """The model with its tokenizer: logits of images for captions.

    Args:
        model: the CLIP model.
        tokenizer: its tokenizer.
    """

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        self.model, self.tokenizer = model, tokenizer

    def text(self, captions: Sequence[str]) -> Tensor:
        """Return unit features of captions, scaled by the logit scale, (n, dimensions)."""
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        output = self.model.text_model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
        features = self.model.text_projection(output.pooler_output)
        return F.normalize(features, dim=-1) * self.model.logit_scale.clamp(max=MAX_LOGIT_SCALE).exp()

    def image(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Return unit features (n, dimensions) and patch states (n, patches, width) of images in [-1, 1]."""
        output = self.model.vision_model(pixel_values=images)
        features = self.model.visual_projection(output.pooler_output)
        return F.normalize(features, dim=-1), output.last_hidden_state[:, 1:]

    @torch.no_grad()
    def logits(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Score images in [-1, 1] for a caption each, (n,)."""
        return (self.image(images)[0] * self.text(captions)).sum(-1)


def train_contrastive(workspace: Workspace) -> None:
    """Step 1: true pictures against wrong ones, on renderings."""
    torch.manual_seed(2)
    tokenizer = build_tokenizer()
    model = build_proxy(tokenizer)
    scorer = Scorer(model, tokenizer)
    head = nn.Linear(VISION_WIDTH, 1 + len(SHAPES) * len(COLORS))

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(f"proxy/{step}")
        records = [draw_prompt("train", rng) for _ in range(CAPTIONS)]
        scenes = [arrange(record.metadata, rng) for record in records]
        true = [draw_scene(scene, rng) for scene in scenes]
        changed = [render(spoil_meaning(record.metadata, rng), rng) for record in records]
        deformed = [spoil_picture(t, record.metadata, rng) for t, record in zip(true, records, strict=True)]
        pictures = to_tensor([soften(p, rng) for p in (*true, *changed, *deformed)])
        image, patches = scorer.image(pictures)
        wrong = [spoil_caption(record.text, rng) for record in records for _ in range(WRONG_CAPTIONS)]
        text, wrong_text = scorer.text([*(record.text for record in records), *wrong]).split((CAPTIONS, len(wrong)))
        objects = torch.stack([patch_labels(scene) for scene in scenes])
        located = F.cross_entropy(head(patches[:CAPTIONS]).flatten(0, 1), objects.flatten())
        own = torch.stack([text, *wrong_text.view(CAPTIONS, WRONG_CAPTIONS, -1).unbind(1)])
        worded = F.cross_entropy((own * image[:CAPTIONS]).sum(-1).T, torch.zeros(CAPTIONS, dtype=torch.long))
        return contrast(text @ image.T, records) + worded + located

    folder = workspace.folder("proxy")
    fit("proxy", [model, head], loss, CONTRASTIVE.scaled(workspace), folder)
    model.save_pretrained(folder)


def contrast(logits: Tensor, records: Sequence[PromptRecord]) -> Tensor:
    """Contrastive loss of captions (n) and pictures (true, changed, deformed: 3n), logits (n, 3n).

    A batch may hold a caption twice; the true picture of one is then not wrong for the other.
    """
    count = len(records)
    own = torch.arange(count)
    same = torch.tensor([[a.text == b.text for b in records] for a in records]) & ~torch.eye(count, dtype=torch.bool)
    masked = logits.masked_fill(F.pad(same, (0, 2 * count)), -100.0)
    triple = torch.stack([logits[own, own + block * count] for block in range(3)], dim=1)
    return (
        F.cross_entropy(masked, own)
        + F.cross_entropy(masked[:, :count].T, own)
        + F.cross_entropy(triple, torch.zeros(count, dtype=torch.long))
    )


def patch_labels(scene: Sequence[Placed]) -> Tensor:
    """Say which object lies under each patch: 0 for the ground, else one number for each shape in each colour."""
    side = SIDE // PATCH
    labels = torch.zeros(side, side, dtype=torch.long)
    centers = torch.arange(side) * PATCH + PATCH / 2
    for item in scene:
        distance = torch.hypot(centers[None, :] - item.center[0], centers[:, None] - item.center[1])
        labels[distance < item.radius] = 1 + SHAPES.index(item.shape) * len(COLORS) + COLORS.index(item.color)
    return labels.flatten()


def soften(picture: Picture, rng: random.Random) -> Picture:
    """Disturb every second picture, as decoded latents are disturbed."""
    if rng.random() < 0.5:
        return picture
    noise = np.random.default_rng(rng.getrandbits(32)).normal(0, rng.uniform(0, 8), picture.shape)
    return (picture + noise).clip(0, 255).astype(np.uint8)


def train_pairs(workspace: Workspace) -> None:
    """Step 2: PickScore's objective on sampled pictures, with renderings among them so that step 1 is kept."""
    tokenizer = build_tokenizer()
    model = CLIPModel.from_pretrained(workspace.folder("proxy"))
    scorer = Scorer(model, tokenizer)
    drawn = samples.load(workspace, samples.PROXY)
    pairs = decided_pairs(drawn)[0]

    def loss(step: int, generator: torch.Generator) -> Tensor:
        rng = random.Random(f"proxy-pairs/{step}")
        chosen = rng.choices(pairs, k=SAMPLED)
        captions = [drawn.records[winner].text for winner, _ in chosen]
        good = [drawn.images[winner] for winner, _ in chosen]
        bad = [drawn.images[loser] for _, loser in chosen]
        records = [draw_prompt("train", rng) for _ in range(RENDERED)]
        captions += [record.text for record in records]
        good += list(to_tensor([soften(render(record.metadata, rng), rng) for record in records]))
        bad += list(to_tensor([soften(render(spoil_meaning(r.metadata, rng), rng), rng) for r in records]))
        image, _ = scorer.image(torch.stack([*good, *bad]))
        text = scorer.text(captions)
        # The captions' features carry the logit scale.
        logits = pair_logits(text, image[: len(good)], image[len(good) :], logit_scale=1.0)
        return preference_cross_entropy(logits, torch.ones(len(good)))

    folder = workspace.folder("proxy-pairs")
    fit("proxy-pairs", [model], loss, PAIRS.scaled(workspace), folder)
    with torch.no_grad():
        model.logit_scale.clamp_(max=MAX_LOGIT_SCALE)
    model.save_pretrained(folder)


def decided_pairs(drawn: samples.SampleSet, held_out: float = 0.15) -> tuple[list[tuple[int, int]], ...]:
    """Return pairs (winner, loser) of one caption that the graded verifier decides: for training, and held out."""
    pictures = to_pictures(drawn.images)
    graded = [verify(picture, record.metadata).graded for picture, record in zip(pictures, drawn.records, strict=True)]
    size = samples.LIST_SIZE
    lists = len(graded) // size
    parts: tuple[list[tuple[int, int]], list[tuple[int, int]]] = ([], [])
    for index in range(lists):
        members = range(index * size, (index + 1) * size)
        part = parts[index >= lists * (1 - held_out)]
        part += [(i, j) for i in members for j in members if graded[i] > graded[j]]
    return parts


def export(workspace: Workspace) -> None:
    """Write model (float16), tokenizer and image processor as PickScore's loader expects them."""
    folder = workspace.out / NAME
    save_half(CLIPModel.from_pretrained(workspace.folder("proxy-pairs")), folder)
    build_tokenizer().save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": SIDE},
        crop_size={"height": SIDE, "width": SIDE},
        image_mean=list(MEAN),
        image_std=list(STD),
    ).save_pretrained(folder)
