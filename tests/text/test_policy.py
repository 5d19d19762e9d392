"""Policy and kernel: numbers equal transformers' own, the reference is exact, files load in peft."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffalign.batch import TextBatch
from diffalign.data.loader import MicroBatch
from diffalign.errors import UserError
from diffalign.references import AdaptersOff, CachedReference, FrozenCopy, start_full, start_lora
from diffalign.strategies.base import Context, Piece, Terms
from diffalign.text.data import TextExample
from diffalign.text.encode import TextEncoder
from diffalign.text.kernel import TokenKernel
from diffalign.text.loading import load_text_policy, resolve_text
from diffalign.text.logprobs import token_log_probs
from diffalign.text.policy import TextPolicy
from tests.text.models import tiny_text_policy

EXAMPLES = (
    TextExample("one", "a red star :", ("a photo of a red star", "a photo")),
    TextExample("two", "cat on the mat :", ("hi", "dog on a mat and a cat")),
    TextExample("three", "hi :", ("a cat", "the dog")),
)


def batch_of(policy: TextPolicy, *rows: int) -> TextBatch:
    examples = tuple(EXAMPLES[row] for row in rows or range(3))
    return TextEncoder(policy)(MicroBatch(examples, torch.arange(len(examples))))


def shake(policy: TextPolicy) -> None:
    """Move the trainable adapter away from zero."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.adapters.parameters("default"):
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


def plain(policy: TextPolicy, batch: TextBatch) -> Tensor:
    """The same numbers by the textbook."""
    logits = policy.module(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    values = logits[:, :-1].float().log_softmax(-1).gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return values * batch.completion_mask[:, 1:]


@pytest.mark.parametrize("chunk", [1, 40, 1 << 20])
def test_chunked_log_softmax_equals_the_plain_one_and_its_gradient(chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(9, (3, 4), generator=generator)
    assert torch.allclose(
        token_log_probs(logits, tokens, chunk), logits.log_softmax(-1).gather(-1, tokens[..., None])[..., 0]
    )
    assert torch.autograd.gradcheck(lambda x: token_log_probs(x, tokens, chunk), logits)
    half = logits.detach().bfloat16().requires_grad_()
    values = token_log_probs(half, tokens, chunk)
    assert values.dtype == torch.float32
    values.sum().backward()
    assert half.grad is not None
    assert half.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_log_probs_equal_those_of_the_bare_model(family: str) -> None:
    policy = tiny_text_policy(family)  # type: ignore[arg-type]
    shake(policy)
    batch = batch_of(policy)
    values = policy.token_log_probs(batch.input_ids, batch.attention_mask, batch.completion_mask)
    assert torch.allclose(values, plain(policy, batch), atol=1e-5)
    own = values.sum()
    gradients = torch.autograd.grad(own, policy.adapters.parameters("default"))
    expected = torch.autograd.grad(plain(policy, batch).sum(), policy.adapters.parameters("default"))
    assert all(torch.allclose(g, e, atol=1e-4) for g, e in zip(gradients, expected, strict=True))


def test_padding_and_neighbours_do_not_change_a_row() -> None:
    policy = tiny_text_policy()
    ctx = Context(policy)
    kernel = TokenKernel(reference=False)
    together, alone = batch_of(policy), batch_of(policy, 2)
    whole = kernel.terms(ctx, together, together, Piece())
    single = kernel.terms(ctx, alone, alone, Piece())
    for row, of in ((2, 0), (5, 1)):
        assert torch.allclose(whole[row].sum(), single[of].sum(), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reference_equals_the_untrained_policy_bit_for_bit(dtype: torch.dtype) -> None:
    policy = tiny_text_policy(dtype=dtype)
    ctx = Context(policy, AdaptersOff(policy))
    batch = batch_of(policy)
    kernel = TokenKernel()
    terms = kernel.terms(ctx, batch, batch, Piece())
    assert torch.equal(terms.detach(), kernel.frozen(ctx, batch, batch, Piece())["reference"])
    shake(policy)
    copy = FrozenCopy(tiny_text_policy(adapter=False, dtype=dtype))
    again = kernel.frozen(Context(policy, copy), batch, batch, Piece())["reference"]
    assert torch.equal(again, terms.detach())


def test_copy_in_mixed_precision_is_exact() -> None:
    policy = tiny_text_policy(adapter=False)
    shared = sum(p.nbytes for p in policy.module.parameters())
    reference, batch, kernel = start_full(policy, mixed_precision=torch.bfloat16), batch_of(policy), TokenKernel()
    ctx = Context(policy, reference)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = kernel.terms(ctx, batch, batch, Piece())
        assert torch.equal(terms.detach(), kernel.frozen(ctx, batch, batch, Piece())["reference"])
    assert sum(p.nbytes for p in reference.network.parameters()) < shared


def test_pieces_and_cached_references_give_the_same_terms() -> None:
    policy = tiny_text_policy()
    cached = CachedReference(AdaptersOff(policy))
    kernel = TokenKernel()
    batch = batch_of(policy)
    expected = kernel.frozen(Context(policy, AdaptersOff(policy)), batch, batch, Piece())
    ctx = Context(policy, cached)
    pieces = [Piece(rows=slice(0, 4)), Piece(rows=slice(4, 6))]
    for _ in range(2):  # computed, then remembered
        parts = [kernel.frozen(ctx, batch, batch, piece) for piece in pieces]
        joined = Terms.join([Terms(part["mask"].float(), part) for part in parts], 0)
        assert torch.allclose(joined.reference, expected["reference"], atol=1e-5)
        assert torch.equal(joined.frozen["mask"], expected["mask"])
    assert len(cached) == 6
    shake(policy)  # remembered values do not look at the policy
    short = batch_of(policy, 2)  # another padding
    again = kernel.frozen(ctx, short, short, Piece())["reference"]
    assert again.shape == short.input_ids[:, 1:].shape
    assert torch.allclose(again[0].sum(), expected["reference"][2].sum(), atol=1e-5)


def test_a_reference_cache_of_ragged_rows_survives_its_checkpoint() -> None:
    policy = tiny_text_policy()
    cached, loaded = (CachedReference(AdaptersOff(policy)) for _ in range(2))
    kernel = TokenKernel()
    for rows in ((0,), (1, 2)):
        batch = batch_of(policy, *rows)
        kernel.frozen(Context(policy, cached), batch, batch, Piece())
    loaded.load_state_dict(cached.state_dict())
    batch = batch_of(policy, 2)
    values = [kernel.frozen(Context(policy, c), batch, batch, Piece())["reference"] for c in (cached, loaded)]
    assert torch.equal(*values)


def test_adapter_loads_in_peft_and_comes_back_as_the_start(tmp_path: Path) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = tiny_text_policy(adapter=False)
    base.save(tmp_path / "base", {})
    policy = load_text_policy(tmp_path / "base")
    start_lora(policy)
    shake(policy)
    batch = batch_of(policy)
    expected = policy.token_log_probs(batch.input_ids, batch.attention_mask, batch.completion_mask).detach()
    policy.save(tmp_path / "run", {"method": "dpo"})
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "run").eval()
    ours = plain(TextPolicyLike(stock), batch)  # type: ignore[arg-type]
    assert torch.allclose(ours, expected, atol=1e-5)
    again = load_text_policy(tmp_path / "run")
    reference = start_lora(again)
    values = again.token_log_probs(batch.input_ids, batch.attention_mask, batch.completion_mask).detach()
    assert torch.allclose(values, expected, atol=1e-6)
    assert reference.identity.startswith("adapter:start")
    assert not [p for p in (tmp_path / "run").iterdir() if p.suffix == ".tmp"]


class TextPolicyLike:
    """Holds a module where a policy is expected."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module


def test_generation_repeats_by_seed_and_does_not_depend_on_its_neighbours() -> None:
    policy = tiny_text_policy()
    prompts = ["a red star :", "hi :", "cat on the mat and the dog :"]
    seeds = torch.tensor([5, 6, 7])
    together = policy.generate(prompts, seeds, max_new_tokens=8)
    assert together == policy.generate(prompts, seeds, max_new_tokens=8, batch_size=1)
    assert together != policy.generate(prompts, seeds + 10, max_new_tokens=8)
    greedy = policy.generate(prompts, seeds, max_new_tokens=4, temperature=0)
    ids = policy.tokenizer(prompts[1], return_tensors="pt")["input_ids"]
    stock = policy.module.generate(ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    assert greedy[1] == policy.tokenizer.decode(stock[0, ids.shape[1] :], skip_special_tokens=True)


def test_likely_tokens_are_drawn_as_often_as_they_should() -> None:
    policy = tiny_text_policy()
    ids = policy.tokenizer("hi :", return_tensors="pt")["input_ids"]
    expected = policy.module(ids).logits[0, -1].softmax(-1)
    drawn = policy.generate(["hi :"] * 2000, torch.arange(2000), max_new_tokens=1, batch_size=2000)
    word = policy.tokenizer.decode([int(expected[4:].argmax()) + 4])
    share = sum(text == word for text in drawn) / 2000
    assert abs(share - expected[4:].max().item()) < 0.05


@pytest.mark.parametrize("name", ["no_such_model", "./nowhere/at/all"])
def test_what_is_no_model_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        resolve_text(name)
    with pytest.raises(UserError, match=r"expected config\.json"):
        resolve_text(tmp_path)
