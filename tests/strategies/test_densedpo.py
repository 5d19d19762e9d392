"""DenseDPO's segment loss: limits in which it is a loss already known."""

import math

import pytest
import torch
from torch.testing import assert_close

from diffalign.errors import UserError
from diffalign.strategies.base import Terms
from diffalign.strategies.densedpo import segment_pair_loss
from diffalign.strategies.pair_loss import PairConfig, PairErrors, PairObjective
from tests.strategies.support import numbers

FRAMES = torch.tensor([0, 0, 1, 1, 2])
LABELS = torch.tensor([[1, -1, 0], [1, 1, 1]])
AGGREGATIONS = ["inside", "outside"]


def videos(equal=False):
    policy = numbers(4, 5).requires_grad_()
    return Terms(policy, {"reference": policy.detach().clone() if equal else numbers(4, 5, seed=1)})


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_at_the_reference_the_loss_is_log_two(aggregation):
    output = segment_pair_loss(videos(equal=True), LABELS, FRAMES, 20.0, aggregation)
    assert output.loss.item() == pytest.approx(math.log(2))
    assert output.metrics["implicit_accuracy"].tolist() == [0.5, 0.5]


def test_equal_labels_give_the_loss_of_whole_videos():
    terms = videos()
    dense = segment_pair_loss(terms, torch.ones(2, 3), FRAMES, 20.0).loss
    assert_close(dense, PairObjective(PairConfig(beta=40.0))(PairErrors.of(terms)).loss)


def test_one_segment_makes_both_aggregations_one():
    terms, labels, whole = videos(), torch.tensor([[1], [-1]]), torch.zeros(5, dtype=torch.long)
    inside, outside = (segment_pair_loss(terms, labels, whole, 20.0, a).loss for a in AGGREGATIONS)
    assert_close(inside, outside)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_exchanging_videos_and_labels_changes_nothing(aggregation):
    terms = videos()
    back = Terms(terms.policy.roll(2, 0), {"reference": terms.reference.roll(2, 0)})
    here, there = (
        segment_pair_loss(t, labels, FRAMES, 20.0, aggregation).loss for t, labels in ((terms, LABELS), (back, -LABELS))
    )
    assert_close(here, there)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_tied_segments_and_unlabelled_videos_teach_nothing(aggregation):
    terms = videos()
    labels = torch.tensor([[1, -1, 0], [0, 0, 0]])
    output = segment_pair_loss(terms, labels, FRAMES, 20.0, aggregation)
    (slope,) = torch.autograd.grad(output.loss, terms.policy)
    assert (slope[0, :4] != 0).all()
    assert slope[0, 4] == 0
    assert (slope[[1, 3]] == 0).all()
    assert_close(output.loss.detach(), output.metrics["loss"][0])
    assert output.metrics["labelled_share"].tolist() == [1, 0]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_gradients_by_finite_differences(aggregation):
    reference = numbers(4, 5, seed=1)

    def loss(policy):
        return segment_pair_loss(Terms(policy, {"reference": reference}), LABELS, FRAMES, 20.0, aggregation).loss

    assert torch.autograd.gradcheck(loss, numbers(4, 5).requires_grad_())


def test_nothing_labelled_gives_a_zero_loss():
    assert segment_pair_loss(videos(), torch.zeros(2, 3), FRAMES, 20.0).loss == 0


def test_unknown_aggregation_names_the_nearest():
    with pytest.raises(UserError, match="did you mean 'inside'"):
        segment_pair_loss(videos(), LABELS, FRAMES, 20.0, "insid")
