"""Diffusion-KTO and TKTO: utilities, reference points over all processes, labels."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffalign.errors import UserError
from diffalign.strategies.base import Piece, Terms
from diffalign.strategies.diffusion_kto import (
    DiffusionKTO,
    DiffusionKTOConfig,
    unrelated,
    unrelated_condition,
    with_unrelated_captions,
)
from diffalign.strategies.tkto import TKTO, TKTOConfig
from diffalign.strategies.utility import UtilityObjective, batch_mean, class_means, utility
from diffalign.training.processes import Processes
from diffalign.training.update import GradientPass
from tests.battery.methods import select
from tests.strategies.support import context, examples, image_batch, moved_policy, numbers, objective, step, terms

LABELS = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def value(err, ref_err, label=LABELS, **config):
    strategy = DiffusionKTO(DiffusionKTOConfig(**config))
    return objective(strategy, terms(err, ref_err, label=label), examples(len(err)))


def test_at_the_reference_every_example_costs_half_its_weight():
    err = numbers(5)
    output = value(err, err, weight_liked=1.5, weight_disliked=0.5)
    torch.testing.assert_close(output.metrics["loss"], 0.25 + LABELS / 2)
    torch.testing.assert_close(output.loss.item(), (3 * 0.75 + 2 * 0.25) / 5)


def test_the_reference_point_is_the_clamped_mean_gain_and_carries_no_gradient():
    ref_err, beta = numbers(5, seed=1) + 0.3, 5.0
    err = numbers(5).requires_grad_()
    gain = (ref_err - err).detach()
    output = value(err, ref_err, beta=beta)
    torch.testing.assert_close(output.metrics["reference_point"], gain.mean())
    output.loss.backward()
    sign = 2 * LABELS - 1
    h = torch.sigmoid(sign * beta * (gain - gain.mean()))
    torch.testing.assert_close(err.grad, sign * beta * h * (1 - h) / 5)
    assert value(err.detach(), err.detach() - 0.1).metrics["reference_point"] == 0


def test_class_means_are_averaged_without_clamping():
    err, ref_err = numbers(5), numbers(5, seed=1) - 0.2
    gain = ref_err - err
    expected = (gain[LABELS == 1].mean() + gain[LABELS == 0].mean()) / 2
    assert expected < 0
    torch.testing.assert_close(value(err, ref_err, reference_point="class_means").metrics["reference_point"], expected)
    alone = value(err, ref_err, label=torch.ones_like(LABELS), reference_point="class_means")
    torch.testing.assert_close(alone.metrics["reference_point"], gain.mean() / 2)


def test_reference_points_reduced_over_processes_are_those_of_all_examples():
    gain, label = numbers(6)[:, None] - 0.1, torch.tensor([1.0, 0, 0, 1, 1, 1], dtype=torch.float64)[:, None]
    parts = [slice(0, 2), slice(2, 6)]
    for point in (lambda g, y, reduce: batch_mean(g, reduce), class_means):
        sums = [torch.zeros(())]

        def add(total, sums=sums):
            sums[0] = sums[0] + total
            return sums[0]

        first, both = (point(gain[part], label[part], add) for part in parts)
        torch.testing.assert_close(both, point(gain, label, lambda total: total))
        assert first != both


def test_flipping_labels_flips_the_logit_and_beta_scales_it():
    err, ref_err = numbers(5), numbers(5, seed=1)
    first = value(err, ref_err, beta=10.0).metrics["logit"]
    torch.testing.assert_close(value(err, ref_err, label=1 - LABELS, beta=10.0).metrics["logit"], -first)
    torch.testing.assert_close(value(err, ref_err, beta=30.0).metrics["logit"], 3 * first)


@settings(max_examples=40, deadline=None)
@given(st.floats(-50, 50))
def test_utilities(z):
    at = torch.tensor(z, dtype=torch.float64)
    assert 0 <= utility(at, "sigmoid") <= 1
    torch.testing.assert_close(utility(at, "loss_averse"), utility(at, "sigmoid").log(), atol=1e-9, rtol=1e-6)
    torch.testing.assert_close(utility(at, "risk_seeking"), -utility(-at, "loss_averse"))


def test_the_sigmoid_loss_stays_within_its_bounds_at_extreme_errors():
    err = torch.tensor([0.0, 1e6, 0.0, 1e6, 3.0], dtype=torch.float64)
    output = value(err, err.flip(0), weight_liked=2.0)
    assert 0 <= output.loss <= 2
    assert all(metric.isfinite().all() for metric in output.metrics.values())


@pytest.mark.parametrize("kind", ["sigmoid", "loss_averse", "risk_seeking"])
def test_gradients_by_finite_differences(kind):
    ref_err, err = numbers(5, seed=1), numbers(5).requires_grad_()
    point = {"reference_point": torch.tensor(0.02, dtype=torch.float64)}
    goal = UtilityObjective(10.0, kind, (1.3, 0.7))
    assert torch.autograd.gradcheck(lambda e: goal(terms(e, ref_err, label=LABELS), point).loss, err)


def test_unknown_names_offer_the_nearest():
    with pytest.raises(UserError, match="did you mean 'loss_averse'"):
        utility(torch.zeros(1), "loss_aversion")
    with pytest.raises(UserError, match="did you mean 'batch_mean'"):
        value(numbers(5), numbers(5), reference_point="batch_means")


@pytest.mark.parametrize(
    "make",
    [
        lambda scope: DiffusionKTO(DiffusionKTOConfig(reference_scope=scope)),
        lambda scope: TKTO(TKTOConfig(reference_scope=scope)),
    ],
)
def test_the_scope_of_the_reference_point_is_told_to_the_loop(make):
    assert [make(scope).spec.statistics for scope in ("update", "micro_batch")] == ["update", "micro_batch"]


@pytest.mark.parametrize("process", ["epsilon", "v_prediction", "flow"])
@pytest.mark.parametrize("name", ["diffusion_kto", "tkto"])
def test_labels_travel_with_their_rows(name, process):
    policy = moved_policy(process)
    if name == "tkto":
        strategy, labels = TKTO(TKTOConfig(beta=3.0)), [1.0] * 3 + [0.0] * 3
        batch = image_batch(policy, examples=3)
    else:
        strategy, labels = DiffusionKTO(DiffusionKTOConfig(beta=3.0)), LABELS.tolist()
        batch = image_batch(policy, examples=5, images=1, label=LABELS.float())
    ctx = context(policy)
    whole, output = step(strategy, ctx, batch)
    draws = strategy.draw(ctx, batch)
    parts = []
    for rows in (slice(0, 2), slice(2, len(labels))):
        piece = Piece(rows=rows)
        frozen = strategy.frozen(ctx, batch, draws, piece)
        parts.append(Terms(strategy.terms(ctx, batch, draws, piece), frozen))
    split = objective(strategy, Terms.join(parts, 0), batch)
    torch.testing.assert_close(split.loss, output.loss)
    assert whole.frozen["label"][:, 0].tolist() == labels
    output.loss.backward()
    assert policy.module.delta["default"].grad.abs().sum() > 0


def mismatched() -> DiffusionKTO:
    return DiffusionKTO(DiffusionKTOConfig(reference_point="mismatched", beta=3.0))


def test_mismatched_captions_as_the_reference_point():
    policy, strategy = moved_policy(), mismatched()
    batch = image_batch(policy, examples=5, images=1, label=LABELS.float())
    ctx = context(policy)
    (update,) = strategy.collect(ctx, [batch])
    values, output = step(strategy, ctx, *update.micro_batches)
    rolled = batch.with_conditions((batch.condition.select(torch.arange(5).roll(1)),))
    other, _ = step(DiffusionKTO(DiffusionKTOConfig()), ctx, rolled)
    gain = (other.reference - other.policy).detach()
    torch.testing.assert_close(values.frozen["mismatched_gain"], gain)
    torch.testing.assert_close(output.metrics["reference_point"], gain.mean())
    assert not values.frozen["mismatched_gain"].requires_grad
    assert output.loss.isfinite()


@pytest.mark.parametrize("parts", [[[0], [1], [2], [3], [4]], [[0, 1], [2, 3, 4]]])
def test_mismatched_captions_do_not_depend_on_the_split_into_micro_batches(parts):
    policy = moved_policy()
    batch = image_batch(policy, examples=5, images=1, label=LABELS.float())
    points, slopes = [], []
    for batches in ([batch], [select(batch, part) for part in parts]):
        strategy, ctx = mismatched(), context(policy, global_batch=5)
        strategy.build(ctx)
        (update,) = strategy.collect(ctx, batches)
        trained = policy.module.delta["default"]
        trained.grad = None
        account = GradientPass(strategy, ctx, [trained], Processes())(update)
        points.append(account.sums["reference_point"] / 5)
        slopes.append(trained.grad.clone())
    torch.testing.assert_close(points[1], points[0])
    torch.testing.assert_close(slopes[1], slopes[0], rtol=1e-4, atol=1e-7)


def test_images_meet_captions_that_differ_from_their_own():
    assert unrelated(["a", "b", "c"]).tolist() == [2, 0, 1]
    assert unrelated(["a", "a", "b", "a"]).tolist() == [2, 2, 1, 2]
    assert unrelated(["a", "a"]).tolist() == [2, 2]  # the empty caption
    policy = moved_policy()
    alone = image_batch(policy, examples=1, images=1, label=LABELS[:1].float())
    (seen,) = with_unrelated_captions([alone], policy.null_condition(1))
    empty = policy.encode_prompts([""]).tensors["prompt_embeds"]
    torch.testing.assert_close(unrelated_condition(seen).tensors["prompt_embeds"], empty)


def test_steps_of_one_image_a_process_have_no_other_captions():
    policy = moved_policy()
    mismatched().build(context(policy, global_batch=4, world_size=2))
    DiffusionKTO(DiffusionKTOConfig()).build(context(policy, global_batch=1))
    for batch, processes in ((1, 1), (3, 2)):
        with pytest.raises(UserError, match=rf"steps of {batch} on {processes} process\(es\) leave each process one"):
            mismatched().build(context(policy, global_batch=batch, world_size=processes))


def test_missing_labels_are_named():
    policy = moved_policy()
    batch = replace(image_batch(policy, examples=2, images=1), fields={"scores": torch.ones(2)})
    with pytest.raises(UserError, match=r"needs a 'label'.*has the fields: scores"):
        step(DiffusionKTO(DiffusionKTOConfig()), context(policy), batch)


def test_captions_that_read_alike_cancel_as_both_see_one_noisy_image():
    policy, strategy = moved_policy(), TKTO(TKTOConfig(beta=3.0))
    batch = image_batch(policy, examples=3)
    once = batch.latents[:3]
    alike = replace(batch, latents=torch.cat([once, once]), conditions=(batch.conditions[0],) * 2)
    values, output = step(strategy, context(policy), alike)
    torch.testing.assert_close(values.policy[:3], values.policy[3:])
    assert output.metrics["loss"].shape == (3,)
    output.loss.backward()
    assert policy.module.delta["default"].grad.abs().max() < 1e-7
