"""The same questions to every image method that is registered, on a policy of two numbers and on tiny real models."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffalign.errors import UserError
from diffalign.policies.base import Policy
from diffalign.strategies.base import Terms, Update
from diffalign.strategies.beta import beta_for_sums
from diffalign.strategies.metrics import GLOSSARY
from diffalign.strategies.rankdpo import pair_weights, preference_probabilities
from diffalign.strategies.registry import get_method, list_methods
from diffalign.training.config import TrainConfig
from diffalign.training.processes import Processes
from diffalign.training.sharding import refuse_unless_shardable
from diffalign.training.update import GradientPass
from tests.battery.methods import (
    NAMES,
    PAIRS,
    PROCESSES,
    CountingPolicy,
    batch_for,
    context,
    described,
    gradient,
    inversion_moves,
    make,
    select,
    swapped,
)
from tests.battery.on_policy import NAMES as ON_POLICY
from tests.factories import tiny_sd, tiny_sd3

MOVED = (0.05, -0.04)
every_method = pytest.mark.parametrize("name", NAMES)
every_pair_method = pytest.mark.parametrize("name", PAIRS)
every_process = pytest.mark.parametrize("process", PROCESSES)


class HalfPolicy(CountingPolicy):
    """A toy policy whose predictions are bfloat16."""

    def predict(self, latents, timesteps, condition):
        return super().predict(latents, timesteps, condition).bfloat16()


def evaluate(strategy, policy, batch, draws=None):
    """Terms and loss of one micro-batch, in one piece."""
    ctx = context(policy, strategy)
    draws = strategy.draw(ctx, batch) if draws is None else draws
    pieces = strategy.pieces(ctx, batch, draws)
    frozen = [strategy.frozen(ctx, batch, draws, piece) for piece in pieces]
    parts = [Terms(strategy.terms(ctx, batch, draws, p), f) for p, f in zip(pieces, frozen, strict=True)]
    terms = Terms.join(parts, strategy.spec.piece_dim)
    return terms, loss_of(strategy, terms, batch)


def loss_of(strategy, terms, batch):
    plain = Terms(terms.policy.detach(), terms.frozen)
    return strategy.loss(terms, strategy.statistics(plain, lambda total: total), batch)


def test_every_registered_method_is_asked():
    """``tests/strategies/test_reno.py`` asks the one that trains noise."""
    assert [method.name for method in list_methods("image")] == sorted([*NAMES, *ON_POLICY, "reno"])


@every_method
def test_images_that_a_method_samples_are_counted(name):
    policy, strategy = CountingPolicy(), make(name)
    ctx = context(policy, strategy)
    strategy.collect(ctx, [])
    strategy.draw(ctx, batch_for(name, policy))
    assert ctx.progress.images == (4 if strategy.spec.lockstep == "none" else 0)


@every_process
@every_pair_method
def test_at_the_reference_the_logit_is_zero_and_the_loss_log_two(name, process):
    for policy in (CountingPolicy(process), HalfPolicy(process)):
        terms, output = evaluate(make(name), policy, batch_for(name, policy))
        assert terms.policy.dtype == torch.float32
        assert output.loss.item() == pytest.approx(math.log(2), abs=1e-6)
        assert output.metrics["logit"].tolist() == [0.0] * 4
        assert output.metrics["implicit_accuracy"].tolist() == [0.5] * 4
        assert output.metrics["effective_weight"].tolist() == [0.5] * 4


def test_what_pulls_at_the_start_is_as_the_glossary_says():
    policy = CountingPolicy()
    for name in ("diffusion_kto", "tkto"):
        _, output = evaluate(make(name), policy, batch_for(name, policy))
        assert output.metrics["effective_weight"].tolist() == [0.25] * 4
    batch = batch_for("rankdpo", policy)
    weights = pair_weights(preference_probabilities(batch.fields["scores"][:, :, None]))
    _, output = evaluate(make("rankdpo"), policy, batch)
    assert_close(output.metrics["effective_weight"], weights.sum((1, 2)) / 2)


@every_process
@every_method
def test_the_first_gradient_is_not_zero_except_where_the_objective_is_even(name, process):
    policy = CountingPolicy(process)
    first, _ = gradient(make(name), policy, [batch_for(name, policy)])
    assert first.isfinite().all()
    assert (first.abs().max() > 0) == (not described(name).even)


@every_process
@every_pair_method
def test_swapping_the_images_flips_the_logit(name, process):
    # the random term of an inversion belongs to the image's place in the pair
    policy, strategy = CountingPolicy(process, MOVED), make(name, **({"inversion_eta": 0.0} if name == "inpo" else {}))
    batch = batch_for(name, policy)
    logit, back = (evaluate(strategy, policy, b)[1].metrics["logit"] for b in (batch, swapped(batch)))
    assert_close(back, -logit, rtol=1e-4, atol=1e-6)
    assert logit.abs().max() > 0


@every_method
def test_less_error_of_liked_images_and_more_of_disliked_ones_lower_the_loss(name):
    policy, strategy = CountingPolicy(delta=MOVED, double=True), make(name)
    batch = batch_for(name, policy, dtype=torch.float64)
    terms, _ = evaluate(strategy, policy, batch)
    values = terms.policy.detach().requires_grad_()
    loss = loss_of(strategy, Terms(values, terms.frozen), batch).loss
    (slope,) = torch.autograd.grad(loss, values)
    numeric = torch.stack([_difference(strategy, terms, batch, row) for row in range(len(values))])
    assert_close(slope[:, 0], numeric, rtol=1e-4, atol=1e-9)

    blocks = slope.view(-1, batch.size)
    if strategy.spec.data == "winners":  # what stands beside them is the policy's own
        liked, disliked = blocks[:1], blocks[1:]
    elif strategy.spec.data == "prompts":
        liked, disliked = blocks, blocks[:0]
    elif "label" in batch.fields:
        liked, disliked = blocks[:, batch.fields["label"] == 1], blocks[:, batch.fields["label"] == 0]
    else:
        liked, disliked = blocks[:: batch.images_per_example], blocks[batch.images_per_example - 1 :: 2]
    sign = described(name).liked_sign
    assert (sign * liked > 0).all()
    assert (sign * disliked < 0).all()


def _difference(strategy, terms: Terms, batch, row: int, step: float = 1e-6) -> Tensor:
    sides = []
    for sign in (1, -1):
        values = terms.policy.detach().clone()
        values[row] += sign * step
        fixed = strategy.statistics(Terms(terms.policy.detach(), terms.frozen), lambda total: total)
        sides.append(strategy.loss(Terms(values, terms.frozen), fixed, batch).loss)
    return (sides[0] - sides[1]) / (2 * step)


@every_process
@every_method
def test_gradients_of_the_weights_agree_with_finite_differences(name, process):
    policy, strategy = CountingPolicy(process, MOVED, double=True), make(name)
    batch, ctx = batch_for(name, policy, dtype=torch.float64), context(policy, strategy)
    draws = strategy.draw(ctx, batch)
    terms, output = evaluate(strategy, policy, batch, draws)
    fixed = strategy.statistics(Terms(terms.policy.detach(), terms.frozen), ctx.reduce)
    (exact,) = torch.autograd.grad(output.loss, policy.trained)
    start, numeric = policy.trained.detach().clone(), torch.zeros(2, dtype=torch.float64)
    for index in range(2):
        for sign in (1, -1):
            policy.trained.data.copy_(start)
            policy.trained.data[index] += sign * 1e-6
            with torch.no_grad():
                pieces = strategy.pieces(ctx, batch, draws)
                values = torch.cat([strategy.terms(ctx, batch, draws, piece) for piece in pieces])
            numeric[index] += sign * strategy.loss(Terms(values, terms.frozen), fixed, batch).loss / 2e-6
    assert_close(exact, numeric, rtol=1e-4, atol=1e-7)


@every_method
def test_micro_batches_rows_and_order_change_nothing(name):
    policy, strategy = CountingPolicy(delta=MOVED, double=True), make(name)
    batch = batch_for(name, policy, dtype=torch.float64)
    whole, account = gradient(strategy, policy, [batch])
    for parts in ([[0, 1], [2, 3]], [[3, 1, 0, 2]], [[2], [0], [3], [1]]):
        split, its = gradient(strategy, policy, [select(batch, part) for part in parts])
        assert_close(split, whole, rtol=1e-9, atol=1e-12)
        assert_close(its.sums, account.sums, rtol=1e-5, atol=1e-6)
    policy.trained_rows = 0
    limited, _ = gradient(strategy, policy, [batch], max_rows=2)
    assert_close(limited, whole, rtol=1e-9, atol=1e-12)
    assert policy.trained_rows <= 2


@every_method
def test_number_of_denoiser_calls(name):
    expectation, policy = described(name), CountingPolicy()
    if expectation.calls is None:
        pytest.skip("samples as often as it likes")
    strategy = make(name)
    batch = batch_for(name, policy)
    inverted = 0
    if expectation.inversion:
        moves = inversion_moves(strategy.draw(context(policy, strategy), batch).timesteps)
        inverted = expectation.inversion * moves
        policy.calls.clear()
    gradient(strategy, policy, [batch])
    expected = {"policy": 0, "reference": 0, **expectation.calls}
    expected["policy"] += inverted
    assert {kind: policy.calls[kind] for kind in expected} == expected


@every_method
def test_hooks_that_must_stay_in_step_take_the_same_passes_for_any_examples(name):
    """What ``Spec.lockstep`` promises of processes that share a network in shards, and no more than it promises."""
    strategy = make(name)
    if strategy.spec.lockstep == "none":
        pytest.skip("promises nothing, and is refused there")
    in_draw, elsewhere = set(), set()
    for shift in range(12):
        policy = CountingPolicy()
        batch = batch_for(name, policy, examples=1)
        batch = replace(batch, seeds=batch.seeds + shift)
        strategy.draw(context(policy, strategy), batch)
        drawn = policy.calls.total()
        gradient(strategy, policy, [batch])
        in_draw.add(drawn)
        elsewhere.add(policy.calls.total() - 2 * drawn)
    assert len(elsewhere) == 1
    assert (len(in_draw) == 1) == (strategy.spec.lockstep == "all")


@pytest.mark.parametrize("name", [method.name for method in list_methods()])
def test_methods_that_sample_promise_no_lockstep_and_refuse_shards(name):
    method = get_method(name)
    config = TrainConfig(name, method.strategy.Config())
    spec = method.strategy(config.method_config).spec
    assert (spec.lockstep == "none") == (
        method.family in ("on-policy", "self-play", "reward gradient", "inference time")
    )
    if spec.lockstep == "none":
        with pytest.raises(UserError, match=f"'{name}' samples while it trains"):
            refuse_unless_shardable(spec, config)
    else:
        refuse_unless_shardable(spec, config)


@every_process
@every_method
def test_extreme_errors_stay_finite(name, process):
    policy = CountingPolicy(process, (3.0, -2.0))
    batch = batch_for(name, policy)
    got, account = gradient(make(name), policy, [replace(batch, latents=1e4 * batch.latents)])
    assert got.isfinite().all()
    assert all(value.isfinite().all() for value in account.sums.values())


@every_method
def test_half_precision_predictions_give_single_precision_terms(name):
    policy = HalfPolicy(delta=MOVED)
    terms, output = evaluate(make(name), policy, batch_for(name, policy))
    assert terms.policy.dtype == output.loss.dtype == torch.float32
    assert all(value.dtype == torch.float32 for value in terms.frozen.values())


@every_method
def test_metrics_are_detached_documented_and_one_an_example(name):
    policy = CountingPolicy(delta=MOVED)
    batch = batch_for(name, policy)
    strategy = make(name)
    _, output = evaluate(strategy, policy, batch)
    assert output.metrics.keys() <= {**GLOSSARY, **strategy.glossary}.keys()
    for value in output.metrics.values():
        assert not value.requires_grad
        assert value.shape in {(), (batch.size,)}
    assert_close(output.metrics["loss"].mean(), output.loss.detach(), rtol=1e-5, atol=1e-6)
    if described(name).pairs:
        every_run = {"logit", "implicit_accuracy", "winner_margin", "loser_margin", "effective_weight"}
        assert every_run <= output.metrics.keys()


@every_method
def test_state_survives_a_round_trip_and_foreign_state_is_refused(name):
    strategy = make(name)
    other = make(name)
    other.load_state_dict(strategy.state_dict())
    assert other.state_dict() == strategy.state_dict()
    with pytest.raises(ValueError, match="checkpoint"):
        other.load_state_dict({"of_another_method": 1})


@pytest.mark.parametrize(("names", "factor"), [([*PAIRS, "seppo"], 0.5), (["rankdpo", "diffusion_kto", "tkto"], 1.0)])
def test_the_header_says_what_beta_is_on_sums(names, factor):
    policy = CountingPolicy()
    elements = math.prod(policy.latent_shape(*policy.default_resolution))
    for name in names:
        strategy = make(name)
        (line,) = strategy.describe(context(policy, strategy))
        assert f"beta 20 on errors of epsilon averaged over the {elements} elements" in line
        assert f"{beta_for_sums(20.0, elements, factor):.3g} on their sums" in line


@pytest.mark.parametrize("name", [m.name for m in list_methods() if hasattr(m.strategy.Config, "beta")])
def test_a_beta_that_would_learn_the_opposite_of_the_data_is_refused(name):
    with pytest.raises(UserError, match=r"beta is -5\.0: expected"):
        get_method(name).strategy.Config(beta=-5.0)
    if name != "mapo":  # without its margin, MaPO is fine-tuning
        with pytest.raises(UserError, match=r"beta is 0\.0: expected a number above 0"):
            get_method(name).strategy.Config(beta=0.0)


@pytest.mark.parametrize("name", [n for n in NAMES if hasattr(get_method(n).strategy.Config, "timestep_floor")])
def test_methods_that_draw_timesteps_can_leave_out_the_least_noisy(name):
    policy, warm = CountingPolicy(), {"warm_start_steps": 1} if name == "inversion_dpo" else {}
    batch, lowest = batch_for(name, policy, examples=60), []
    for floor in (0.0, 0.4):
        strategy = make(name, timestep_floor=floor, **warm)
        ctx = context(policy, strategy)
        strategy.collect(ctx, [])
        draws = strategy.draw(ctx, batch)
        lowest.append(getattr(draws, "noised", draws).timesteps.min())
    assert lowest[0] < 200
    assert 400 <= lowest[1] < 600
    with pytest.raises(UserError, match=r"timestep_floor is 1\.0"):
        make(name, timestep_floor=1.0)


@pytest.mark.parametrize("name", [*PAIRS, "seppo"])
def test_supervision_and_the_rejected_gradient_scale(name):
    policy = CountingPolicy(delta=MOVED, double=True)
    batch = batch_for(name, policy, dtype=torch.float64)
    slopes = {}
    for scale in (1.0, 0.5):
        strategy = make(name, rejected_gradient_scale=scale)
        terms, _ = evaluate(strategy, policy, batch)
        values = terms.policy.detach().requires_grad_()
        (slope,) = torch.autograd.grad(loss_of(strategy, Terms(values, terms.frozen), batch).loss, values)
        slopes[scale] = slope.view(-1, 2, batch.size)
    assert_close(slopes[0.5][:, 0], slopes[1.0][:, 0])
    assert_close(slopes[0.5][:, 1], 0.5 * slopes[1.0][:, 1])

    plain, supervised = (evaluate(make(name, sft_weight=w), policy, batch)[1].loss for w in (0.0, 0.3))
    if name == "inversion_dpo":  # its terms are no errors of its own: those of plain fine-tuning are added
        errors = evaluate(make("sft"), policy, batch.block(0))[1].loss
    else:
        errors = evaluate(make(name), policy, batch)[0].policy[: batch.size].mean()
    assert_close(supervised - plain, 0.3 * errors)


@cache
def real(family: str) -> Policy:
    return tiny_sd3(lora=True) if family == "flow" else tiny_sd(family, lora=True)


@every_process
@every_method
def test_on_real_networks(name, process):
    policy = real(process)
    options = {"warm_start_steps": 1} if name == "inversion_dpo" else {}
    strategy = make(name, **options)
    ctx = context(policy, strategy)  # may add a frozen adapter
    parameters = [p for p in policy.module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = None
    update = Update([batch_for(name, policy, examples=2)])
    account = GradientPass(strategy, ctx, parameters, Processes())(update)
    assert all(value.isfinite().all() for value in account.sums.values())
    assert all(p.grad is None or p.grad.isfinite().all() for p in parameters)
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in parameters)
