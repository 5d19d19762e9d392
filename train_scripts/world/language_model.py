"""Stage of the bundled world: a small language model that writes captions, imperfectly, and preferences between them.

The model learns from a corpus in which nearly every second caption has a mistake, so at temperature 1 it is right about
every second time. Preferences are pairs of its own samples, one right and one wrong; the parser judges.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffalign.diffusion.random import derive_seed
from diffalign.text.evaluation import WRITER_TOKENS
from diffalign.text.generation import sample_completions
from diffalign.text.rewards import caption_rewards, judge_caption
from diffalign.text.writer import Meaning, draw_requests, meaning_of
from diffalign.world.grammar import COLORS, COUNT_WORDS, SHAPES, Split, draw_prompt, vocabulary

CARELESS = 0.45
"""Share of captions with a mistake in the training corpus."""
SPECIAL = ("<pad>", "<eos>", "<unk>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} : {% endif %}{% endfor %}"
)
PROMPTS: dict[Split, int] = {"train": 1200, "tune": 150, "test": 500}
SAMPLES_PER_PROMPT = 6
MAX_PAIRS_PER_PROMPT = 2
SAMPLING_ROWS = 600


def make_tokenizer() -> Any:
    """Build a tokenizer with one token a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [*SPECIAL, ":", ",", *vocabulary()]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.decoder = decoders.WordPiece(prefix="##")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", model_max_length=64
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(vocab_size: int, pad: int, eos: int) -> Any:
    """Build a Llama of about 0.65 million weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=pad,
        bos_token_id=eos,
        eos_token_id=eos,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def careless_caption(meaning: Meaning, rng: random.Random) -> str:
    """Write a caption with one mistake."""
    mistakes: list[Callable[[Meaning, random.Random], Meaning]] = [_recolor, _reshape, _miscount]
    if len(meaning.things) == 2:
        mistakes += [_drop, _swap_colors] if meaning.things[0].color else [_drop]
    if meaning.relation:
        mistakes.append(_turn_around)
    if rng.random() < 0.2:
        return _stumble(meaning.caption(), rng)
    return rng.choice(mistakes)(meaning, rng).caption()


def _recolor(meaning: Meaning, rng: random.Random) -> Meaning:
    at = rng.randrange(len(meaning.things))
    color = rng.choice([color for color in COLORS if color != meaning.things[at].color])
    return _changed(meaning, at, color=color)


def _reshape(meaning: Meaning, rng: random.Random) -> Meaning:
    at = rng.randrange(len(meaning.things))
    used = {thing.shape for thing in meaning.things}
    return _changed(meaning, at, shape=rng.choice([shape for shape in SHAPES if shape not in used]))


def _miscount(meaning: Meaning, rng: random.Random) -> Meaning:
    at = rng.randrange(len(meaning.things))
    count = rng.choice([count for count in (1, *COUNT_WORDS) if count != meaning.things[at].count])
    return _changed(meaning, at, count=count)


def _drop(meaning: Meaning, rng: random.Random) -> Meaning:
    return Meaning((rng.choice(meaning.things),))


def _swap_colors(meaning: Meaning, rng: random.Random) -> Meaning:
    first, second = meaning.things
    swapped = (replace(first, color=second.color), replace(second, color=first.color))
    return replace(meaning, things=swapped)


def _turn_around(meaning: Meaning, rng: random.Random) -> Meaning:
    return replace(meaning, things=meaning.things[::-1])


def _changed(meaning: Meaning, at: int, **values: Any) -> Meaning:
    things = list(meaning.things)
    things[at] = replace(things[at], **values)
    return replace(meaning, things=tuple(things))


def _stumble(caption: str, rng: random.Random) -> str:
    words = caption.split()
    if rng.random() < 0.5:
        return " ".join(words[:-1])
    at = rng.randrange(3, len(words))
    return " ".join([*words[:at], words[at], *words[at:]])


def draw_text(tokenizer: Any, rng: random.Random) -> tuple[list[int], list[int]]:
    """Draw a request and a caption of the training corpus, as tokens."""
    meaning = meaning_of(draw_prompt("train", rng), rng)
    caption = careless_caption(meaning, rng) if rng.random() < CARELESS else meaning.caption()
    return tokenizer(meaning.request())["input_ids"], [*tokenizer(caption)["input_ids"], tokenizer.eos_token_id]


def train_writer(folder: Path, steps: int = 700, batch_size: int = 48, seed: int = 0) -> None:
    """Train the model from nothing and save it in half precision."""
    torch.manual_seed(seed)
    rng = random.Random(f"writer/{seed}")
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    print(f"{sum(p.numel() for p in model.parameters()):,} weights", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, step / 50) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    for step in range(1, steps + 1):
        rows = [draw_text(tokenizer, rng) for _ in range(batch_size)]
        loss = model(**_padded(rows, tokenizer.pad_token_id)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            print(f"step {step} loss {loss.item():.4f}", flush=True)
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _padded(rows: Sequence[tuple[list[int], list[int]]], pad: int) -> dict[str, torch.Tensor]:
    length = max(len(prompt) + len(completion) for prompt, completion in rows)
    tokens = [[*p, *c] + [pad] * (length - len(p) - len(c)) for p, c in rows]
    labels = [[-100] * len(p) + c + [-100] * (length - len(p) - len(c)) for p, c in rows]
    mask = [[1] * (len(p) + len(c)) + [0] * (length - len(p) - len(c)) for p, c in rows]
    return {
        "input_ids": torch.tensor(tokens),
        "labels": torch.tensor(labels),
        "attention_mask": torch.tensor(mask),
    }


def make_preferences(model_folder: Path, folder: Path, seed: int = 0) -> dict[str, Any]:
    """Sample captions for the requests of each split and write pairs of a right and a wrong one."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    folder.mkdir(parents=True, exist_ok=True)
    figures: dict[str, Any] = {}
    for split, count in PROMPTS.items():
        rng = random.Random(f"requests/{split}/{seed}")
        drawn = draw_requests(split, count, seed)
        requests = list(drawn)
        asked = [request for request in requests for _ in range(SAMPLES_PER_PROMPT)]
        seeds = torch.tensor([derive_seed("preferences", split, seed, i) for i in range(len(asked))])
        completions = _sample(model, tokenizer, asked, seeds)
        rewards = caption_rewards(asked, completions)
        graded = [judge_caption(*both).graded for both in zip(asked, completions, strict=True)]
        figures[split] = {"reward": rewards.mean().item(), "graded": sum(graded) / len(graded)}
        columns = ("kind", "composition")
        table = {"prompt": requests, **{name: [getattr(r, name) for r in drawn.values()] for name in columns}}
        pq.write_table(pa.table(table), folder / f"prompts_{split}.parquet")
        pairs = _pairs(requests, completions, rewards.tolist(), rng)
        figures[split]["pairs"] = len(pairs)
        pq.write_table(pa.Table.from_pylist(pairs), folder / f"{split}.parquet")
    return figures


def _sample(model: nn.Module, tokenizer: Any, asked: Sequence[str], seeds: torch.Tensor) -> list[str]:
    completions: list[str] = []
    for rows in torch.arange(len(asked)).split(SAMPLING_ROWS):
        chunk = [asked[row] for row in rows.tolist()]
        completions += sample_completions(model, tokenizer, chunk, seeds[rows], max_new_tokens=WRITER_TOKENS)
    return completions


def _pairs(requests: Sequence[str], completions: Sequence[str], rewards: Sequence[float], rng: random.Random) -> Any:
    pairs = []
    for index, request in enumerate(requests):
        block = slice(index * SAMPLES_PER_PROMPT, (index + 1) * SAMPLES_PER_PROMPT)
        judged = sorted(set(zip(completions[block], rewards[block], strict=True)))
        both = [(right, wrong) for right, good in judged if good for wrong, bad in judged if not bad]
        for right, wrong in rng.sample(both, min(MAX_PAIRS_PER_PROMPT, len(both))):
            graded = judge_caption(request, wrong).graded
            scores = {"score_chosen": 1.0, "score_rejected": 0.0, "graded_rejected": graded}
            pairs.append({"prompt": request, "chosen": right, "rejected": wrong, **scores})
    return pairs


def write_cards(out: Path, figures: dict[str, Any]) -> None:
    """Write a README into both folders."""
    test = figures["test"]
    (out / "tiny-writer" / "README.md").write_text(
        "# tiny-writer\n\nA Llama of 0.64 million weights that answers a request such as `red circle , blue star :` "
        "by a caption of the bundled world. Trained by `train_scripts/world/language_model.py` on a corpus in "
        f"which {CARELESS:.0%} of the captions have a mistake, so that preference training has something to mend. "
        f"At temperature 1 its caption is right for {test['reward']:.1%} of the test requests (mean graded reward "
        f"{test['graded']:.3f}); a parser judges.\n",
        encoding="utf-8",
    )
    rows = "\n".join(f"| {s} | {PROMPTS[s]} | {figures[s]['pairs']} | {figures[s]['reward']:.3f} |" for s in PROMPTS)
    (out / "writer-preferences" / "README.md").write_text(
        "# writer-preferences\n\nPairs of tiny-writer's own captions for one request, the chosen one right, the "
        "rejected one wrong. What tune and test ask for never occurs in train, where the kind of caption has room for "
        "that.\n\n| split | requests | pairs | mean reward of the samples |\n|---|---|---|---|\n" + rows + "\n\n"
        "`train.parquet`, `tune.parquet`, `test.parquet`: `prompt`, `chosen`, `rejected`, `score_chosen` (1), "
        "`score_rejected` (0), `graded_rejected` (share of satisfied checks of the wrong caption).\n"
        "`prompts_*.parquet`: `prompt`, `kind`, `composition` of all requests.\n",
        encoding="utf-8",
    )


def build(out: Path, steps: int = 700) -> dict[str, Any]:
    """Make ``tiny-writer`` and ``writer-preferences`` in a folder and return the measured figures."""
    train_writer(out / "tiny-writer", steps)
    figures = make_preferences(out / "tiny-writer", out / "writer-preferences")
    (out / "writer-preferences" / "measured.json").write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    write_cards(out, figures)
    return figures


def main() -> None:
    """Run the stage alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder that receives both folders")
    parser.add_argument("--steps", type=int, default=700, help="optimizer steps of the model")
    options = parser.parse_args()
    print(json.dumps(build(options.out, options.steps), indent=2))


if __name__ == "__main__":
    main()
