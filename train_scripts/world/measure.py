"""Stage "measure": what the cards state, measured on held-out captions and fresh renderings."""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from numpy.typing import NDArray
from transformers import CLIPModel

from diffalign.inference.generate import generate
from diffalign.policies.loading import load_policy
from diffalign.world.grammar import KINDS, PromptRecord, prompts
from diffalign.world.render import render
from diffalign.world.verifier import verify
from train_scripts.world import proxy, samples
from train_scripts.world.pictures import rendered, to_pictures, to_tensor
from train_scripts.world.spoiled import spoil_meaning
from train_scripts.world.text import build_tokenizer
from train_scripts.world.vae import decode, encode
from train_scripts.world.workspace import Workspace

Figures = dict[str, Any]
CAPTIONS = 300
RENDERINGS = 2000
FILE = "measurements.json"
SAMPLING: dict[str, tuple[int, float]] = {
    "tiny-sd": (samples.STEPS, samples.GUIDANCE),
    "tiny-sd3": (15, 1.0),
    "tiny-sd-turbo": (1, 1.0),
}
"""Model -> steps and guidance scale of its figures."""


def run(workspace: Workspace) -> None:
    """Measure everything that has been built; figures of an earlier build are replaced one by one."""
    figures = read(workspace)
    for name, measurement in _measurements(workspace):
        figures[name] = measurement()
        print(name, json.dumps(figures[name]), flush=True)
        (workspace.cache / FILE).write_text(json.dumps(figures, indent=2), encoding="utf-8")


def read(workspace: Workspace) -> Figures:
    """Return the figures measured so far."""
    path = workspace.cache / FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _measurements(workspace: Workspace) -> Iterable[tuple[str, Callable[[], Figures]]]:
    yield "verifier", lambda: verifier_error(workspace)
    yield "vae", lambda: round_trip(workspace)
    for model in SAMPLING:
        if (workspace.out / model / "model_index.json").is_file():
            yield model, lambda model=model: denoiser(workspace, model)  # type: ignore[misc]
    if (workspace.cache / "proxy-pairs" / "config.json").is_file():
        yield "tiny-pickscore", lambda: proxy_accuracy(workspace)
    if (workspace.out / "preferences" / "images.parquet").is_file():
        yield "preferences", lambda: preference_counts(workspace)


def verifier_error(workspace: Workspace) -> Figures:
    """Judge true renderings, and renderings with one planted error."""
    rng = random.Random("measure/verifier")
    records, _ = _test_records(workspace.amount(RENDERINGS), rng)
    true = [verify(render(record.metadata, rng), record.metadata).correct for record in records]
    wrong = [verify(render(spoil_meaning(record.metadata, rng), rng), record.metadata).correct for record in records]
    return {"true_accepted": float(np.mean(true)), "planted_error_rejected": 1 - float(np.mean(wrong))}


def round_trip(workspace: Workspace) -> Figures:
    """Judge renderings that went through the autoencoder."""
    vae = AutoencoderKL.from_pretrained(workspace.folder("vae")).eval()
    records, images = rendered(workspace.amount(RENDERINGS), random.Random("measure/vae"))
    decoded = decode(vae, encode(vae, images))
    correct = [verify(p, r.metadata).correct for p, r in zip(to_pictures(decoded), records, strict=True)]
    return {"accepted": float(np.mean(correct)), "mse": (decoded - images).square().mean().item()}


def denoiser(workspace: Workspace, model: str) -> Figures:
    """Judge samples for test captions."""
    steps, guidance = SAMPLING[model]
    records = prompts("test", workspace.amount(CAPTIONS), 0)
    policy = load_policy(workspace.out / model)
    captions = [record.text for record in records]
    images = generate(policy, captions, list(range(len(records))), num_steps=steps, guidance_scale=guidance)
    return {"steps": steps, "guidance_scale": guidance, **by_kind(to_pictures(images * 2 - 1), records)}


def by_kind(pictures: NDArray[np.uint8], records: list[PromptRecord]) -> Figures:
    """Return the share of correct pictures, over all and for each kind, and the mean graded score."""
    verdicts: dict[str, list[bool]] = defaultdict(list)
    graded = []
    for picture, record in zip(pictures, records, strict=True):
        verdict = verify(picture, record.metadata)
        verdicts[record.kind].append(verdict.correct)
        graded.append(verdict.graded)
    everything = [correct for kind in verdicts.values() for correct in kind]
    kinds = {kind: float(np.mean(verdicts[kind])) for kind in KINDS if verdicts[kind]}
    return {"captions": len(records), "correct": float(np.mean(everything)), "graded": float(np.mean(graded)), **kinds}


def proxy_accuracy(workspace: Workspace) -> Figures:
    """Share of pairs that the proxy orders as the verifier does: held-out samples, and renderings with one error."""
    scorer = proxy.Scorer(CLIPModel.from_pretrained(workspace.folder("proxy-pairs")).eval(), build_tokenizer())
    drawn = samples.load(workspace, samples.PROXY)
    pairs = proxy.decided_pairs(drawn)[1]
    scores = scorer.logits(drawn.images, [record.text for record in drawn.records])
    ordered = [bool(scores[winner] > scores[loser]) for winner, loser in pairs]
    rng = random.Random("measure/proxy")
    records, captions = _test_records(workspace.amount(RENDERINGS // 4), rng)
    true = to_tensor([render(record.metadata, rng) for record in records])
    wrong = to_tensor([render(spoil_meaning(record.metadata, rng), rng) for record in records])
    margin = scorer.logits(true, captions) - scorer.logits(wrong, captions)
    return {
        "held_out_pairs": len(pairs),
        "held_out_accuracy": float(np.mean(ordered)),
        "rendered_accuracy": (margin > 0).float().mean().item(),
    }


def preference_counts(workspace: Workspace) -> Figures:
    """Count rows and describe the pictures of the train split."""
    import pyarrow.parquet as pq

    folder = workspace.out / "preferences"
    images = pq.read_table(folder / "images.parquet", columns=["proxy", "verifier", "graded"]).to_pydict()
    pairs = pq.read_table(folder / "pairs.parquet", columns=["graded_margin"]).to_pydict()["graded_margin"]
    counts = {name: pq.read_metadata(folder / f"{name}.parquet").num_rows for name in ("images", "lists", "pairs")}
    return {
        **counts,
        "tune_lists": pq.read_metadata(folder / "tune" / "lists.parquet").num_rows,
        "verifier": float(np.mean(images["verifier"])),
        "correlation_proxy_graded": float(np.corrcoef(images["proxy"], images["graded"])[0, 1]),
        "pairs_decided_by_verifier": float(np.mean([margin > 0 for margin in pairs])),
    }


def _test_records(count: int, rng: random.Random) -> tuple[list[PromptRecord], list[str]]:
    records = prompts("test", count, rng.getrandbits(32))
    return records, [record.text for record in records]
