"""Win rates and their intervals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffalign.evaluation.winrate import bootstrap_mean, win_rate, wins

scores = st.lists(st.floats(-5, 5, allow_nan=False), min_size=2, max_size=40)


@given(scores, st.randoms(use_true_random=False))
def test_swapping_sides_mirrors_the_rate(values: list[float], random: object) -> None:
    a, b = torch.tensor(values), torch.tensor(values[::-1])
    assert win_rate(a, b).value == pytest.approx(1 - win_rate(b, a).value)


def test_a_model_ties_with_itself_and_a_shift_wins_everything() -> None:
    a = torch.randn(50, generator=torch.Generator().manual_seed(0))
    assert win_rate(a, a).value == 0.5
    assert win_rate(a + 1, a).value == 1.0
    assert wins(a + 0.1, a, tie_margin=0.2).unique().tolist() == [0.5]


def test_the_wilson_interval_has_its_published_value() -> None:
    # 8 of 10: centre (0.8 + z2/20) / (1 + z2/10), a textbook example: [0.490, 0.943]
    estimate = win_rate(torch.tensor([1.0] * 8 + [0.0] * 2), torch.full((10,), 0.5))
    assert estimate.low == pytest.approx(0.4902, abs=1e-3)
    assert estimate.high == pytest.approx(0.9433, abs=1e-3)


def test_the_bootstrap_contains_the_mean_and_widens_with_disagreeing_runs() -> None:
    generator = torch.Generator().manual_seed(1)
    agreeing = (torch.rand(1, 400, generator=generator) < 0.6).double().repeat(3, 1)
    disagreeing = torch.stack([(torch.rand(400, generator=generator) < p).double() for p in (0.4, 0.6, 0.8)])
    narrow, wide = bootstrap_mean(agreeing), bootstrap_mean(disagreeing)
    assert narrow.low < narrow.value < narrow.high
    assert wide.high - wide.low > 2 * (narrow.high - narrow.low)


def test_unpaired_scores_are_refused() -> None:
    with pytest.raises(ValueError, match="paired"):
        wins(torch.zeros(3), torch.zeros(4))
