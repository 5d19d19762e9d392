"""Win rates and their intervals."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from diffalign.evaluation.comparison import Comparison
from diffalign.evaluation.evaluator import Evaluation, ImageEvaluator
from diffalign.evaluation.winrate import Estimate, bootstrap_mean, win_rate, wins
from diffalign.training.summary import before_and_after, print_table

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


@pytest.mark.parametrize("images", [1, 2])
@pytest.mark.parametrize("interval", ["bootstrap", "auto", "wilson", "exact"])
def test_ties_alone_are_no_interval(images: int, interval: str) -> None:
    if images == 2 and interval in ("wilson", "exact"):
        return
    keys = [(caption, image) for caption in "abc" for image in range(images)]
    same = torch.arange(3.0 * images)
    comparison = Comparison(keys, same, same)
    assert str(comparison.rate(interval)) == f"all {3 * images} tied"  # type: ignore[arg-type]
    assert comparison.summary("x")["shown"] == f"all {3 * images} tied"
    one_won = same + torch.eye(3 * images)[0]
    assert Comparison(keys, one_won, same).rate(interval).tied == 0  # type: ignore[arg-type]


def test_a_caption_won_and_lost_is_no_tie() -> None:
    rate = Comparison([("a", 0), ("a", 1)], torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])).rate()
    assert str(rate) == "0.500 [0.500, 0.500]"
    assert str(win_rate(torch.zeros(4), torch.zeros(4))) == "all 4 tied"
    console = Console(record=True)
    evaluator = ImageEvaluator(["a"], [{}], [0], {}, "proxy")
    same = Evaluation({"proxy": torch.ones(4)}, ["all"] * 4, torch.zeros(4, 3, 1, 1))
    print_table(before_and_after(same, same, evaluator, {}), console)
    assert "win rate over the start by proxy: all 4 tied" in console.export_text()
    assert Estimate(0.25, -0.5, 1.0).shown("+") == "+0.250 [-0.500, +1.000]"
