"""Names, compositions and wrappers of rewards."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffalign.errors import UserError
from diffalign.rewards import loading
from diffalign.rewards.combine import LogSigmoid, Normalised, ParetoRank, UncertaintyWeighted, WeightedSum, WinRate
from diffalign.rewards.compose import RewardSpec, compose, load_parts, parse_rewards
from diffalign.rewards.loading import load_reward
from diffalign.rewards.registry import LoadOptions, Scorer, list_scorers
from diffalign.rewards.transforms import dominates, duel_win_rates, pareto_ranks, win_rates
from tests.rewards.support import Brightness, pictures

SCORES = st.lists(st.integers(-10, 10), min_size=2, max_size=8)


def test_text_of_a_composition() -> None:
    specs = parse_rewards("pickscore:1.0, hpsv2:5,clip@/models/clip:0.01,verifier")
    assert specs == [
        RewardSpec("pickscore", 1.0),
        RewardSpec("hpsv2", 5.0),
        RewardSpec("clip", 0.01, "/models/clip"),
        RewardSpec("verifier", 1.0),
    ]
    assert parse_rewards(r"clip@C:\models\clip")[0].source == r"C:\models\clip"


def test_yaml_says_more_than_text(tmp_path: Path) -> None:
    path = tmp_path / "rewards.yaml"
    path.write_text("rewards:\n  - {name: pickscore, weight: 2e-1, reference: 21e0}\n  - hpsv2:5\n")
    assert parse_rewards(str(path)) == [RewardSpec("pickscore", 0.2, reference=21.0), RewardSpec("hpsv2", 5.0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pickscore:heavy", "the weight of reward 'pickscore' is 'heavy'; expected a number"),
        ([{"name": "graded", "top": "high"}], "the top of reward 'graded' is 'high'; expected a number"),
        ("", "no rewards"),
        ("graded,graded:2", "rewards given twice: graded"),
        ([{"name": "graded", "wieght": 2}], "unknown key of a reward 'wieght': did you mean 'weight'"),
        ([{"weight": 2}], "without a name"),
        ([{"name": "graded", "normalise": True, "reference": 1.0}], "not both"),
        ("nowhere.yaml", "there is no file nowhere.yaml"),
    ],
)
def test_mistakes_in_a_composition(text: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        parse_rewards(text)  # type: ignore[arg-type]


def test_large_judges_take_half_the_memory_on_cuda() -> None:
    large = {scorer.name for scorer in list_scorers() if scorer.large}
    judges = {"unified_reward", "unified_reward_axes", "unified_reward_pair", "vqascore"}
    assert large == {"hpsv3", *judges}
    for scorer in list_scorers():
        assert scorer.usual_dtype("cpu") is torch.float32
        assert scorer.usual_dtype("cuda:1") is (torch.bfloat16 if scorer.name in large else torch.float32)


def test_a_type_that_is_given_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[LoadOptions] = []
    scorer = Scorer("big", "", "", lambda options: asked.append(options) or Brightness(), large=True)  # type: ignore[func-returns-value]
    monkeypatch.setattr(loading, "get_scorer", lambda name: scorer)
    for dtype in (None, torch.float32, torch.float16):
        compose("big", "cuda:0", dtype)
    assert [options.dtype for options in asked] == [torch.bfloat16, torch.float32, torch.float16]


def test_unknown_reward_names_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown reward 'verifyer': did you mean 'verifier'"):
        load_reward("verifyer")
    with pytest.raises(UserError, match="has no weights"):
        load_reward("graded@somewhere")


def test_every_scorer_has_a_summary() -> None:
    scorers = list_scorers()
    assert {"pickscore", "verifier", "graded"} <= {scorer.name for scorer in scorers}
    assert all(scorer.summary for scorer in scorers)


def test_weighted_sum_and_its_description() -> None:
    images = pictures((0.2, 0.5, 0.0), (1.0, 0.0, 0.5)).requires_grad_()
    reward = WeightedSum({"red": Brightness(0), "green": Brightness(1)}, {"red": 2.0, "green": -1.0})
    scores = reward.score(images, ["", ""])
    torch.testing.assert_close(scores, torch.tensor([-0.1, 2.0]))
    assert reward.info.range == (-1.0, 2.0)
    assert reward.info.differentiable
    assert reward.info.licence == "MIT"
    (gradient,) = torch.autograd.grad(scores.sum(), images)
    torch.testing.assert_close(gradient[0, :, 0, 0] * 16, torch.tensor([2.0, -1.0, 0.0]))
    with pytest.raises(UserError, match="weights for"):
        WeightedSum({"red": Brightness()}, {"rad": 1.0})


def test_one_reward_of_weight_one_is_itself() -> None:
    assert compose("graded").info.name == "graded"
    assert compose("graded:0.5").info.range == (0.0, 0.5)


def test_wrappers_see_pictures_of_different_sizes_as_their_rewards_do() -> None:
    pictures = [Image.new("RGB", (40 + 8 * i, 32), (60 * i, 0, 0)) for i in range(3)]
    prompts = ["a", "a", "b"]
    red = [picture.getpixel((0, 0))[0] / 255 for picture in pictures]  # type: ignore[index]
    inner = Brightness(0)
    assert inner.score_pictures(pictures, prompts).tolist() == pytest.approx(red)
    assert LogSigmoid(inner, 0.0).score_pictures(pictures, prompts).exp().tolist() == pytest.approx(
        [1 / (1 + math.exp(-value)) for value in red]
    )
    assert WinRate(inner).score_pictures(pictures, prompts).tolist() == [0.0, 1.0, 0.5]
    assert Normalised(inner).score_pictures(pictures, prompts).mean().item() == pytest.approx(0.0, abs=1e-6)
    both = {"red": inner, "green": Brightness(1)}
    assert ParetoRank(both).score_pictures(pictures, prompts).tolist() == [-1.0, 0.0, 0.0]
    total = WeightedSum(both, {"red": 2.0, "green": 1.0}).score_pictures(pictures, prompts)
    assert total.tolist() == pytest.approx([2 * value for value in red])


def test_each_change_of_an_entry_and_ranks_by_fronts() -> None:
    parts = load_parts(
        parse_rewards(
            [
                {"name": "incompressibility", "top": 50.0},
                {"name": "compressibility", "win_rate": True},
                {"name": "tiny-pickscore", "normalise": True},
            ]
        )
    )
    assert [type(part).__name__ for part in parts.values()] == ["UncertaintyWeighted", "WinRate", "Normalised"]
    noise = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    images = torch.cat([noise, torch.full((1, 3, 16, 16), 0.5)])
    assert parts["compressibility"].score(images, ["a", "a"]).tolist() == [0.0, 1.0]
    assert (parts["incompressibility"].score(images, ["a", "a"]) < 0).all()
    fronts = compose("pareto(compressibility,incompressibility)")
    assert fronts.score(images, ["a", "a"]).tolist() == [0.0, 0.0]
    assert fronts.info.name == "pareto(compressibility,incompressibility)"
    with pytest.raises(UserError, match=r"leave that of 'compressibility' out of pareto"):
        compose("pareto(compressibility:2,graded)")


def test_running_statistics_equal_those_of_all_scores_and_resume() -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.rand(n, 3, 4, 4, generator=generator) for n in (3, 5, 2)]
    reward = Normalised(Brightness())
    for batch in batches:
        reward.score(batch, [""] * len(batch))
    seen = Brightness().score(torch.cat(batches), [""] * 10).double()
    restored = Normalised(Brightness())
    restored.load_state_dict(reward.state_dict())
    restored.frozen = True
    got = restored.score(batches[0], [""] * 3)
    want = (seen[:3] - seen.mean()) / (seen.std(correction=0) + 1e-4)
    torch.testing.assert_close(got, want.float())
    assert restored.state_dict() == reward.state_dict()


def test_log_sigmoid_keeps_order_and_gradient() -> None:
    images = pictures((0.1, 0, 0), (0.9, 0, 0)).requires_grad_()
    scores = LogSigmoid(Brightness(factor=10.0), 5.0).score(images, ["", ""])
    torch.testing.assert_close(scores, torch.nn.functional.logsigmoid(torch.tensor([-4.0, 4.0])))
    assert torch.autograd.grad(scores.sum(), images)[0].abs().sum() > 0


def test_uncertainty_lowers_a_doubtful_reward_only() -> None:
    class Steady(Brightness):
        def score(self, images, prompts, metadata=None):  # type: ignore[no-untyped-def]
            return torch.full((len(images),), 0.25)

    images = pictures((0.5, 0.5, 0.5))
    steady = UncertaintyWeighted(Steady(), top=1.0).score(images, [""])
    torch.testing.assert_close(steady, torch.tensor([-0.75]))
    doubtful = UncertaintyWeighted(Brightness(factor=100.0), top=100.0, weight=0.0)
    once, again = doubtful.score(images, [""]), doubtful.score(images, [""])
    assert torch.equal(once, again)
    assert once > -50.0


def test_duels_and_fronts_stay_within_a_caption() -> None:
    images = pictures((0.1, 0.9, 0), (0.5, 0.5, 0), (0.4, 0.4, 0), (0.0, 0.0, 0))
    prompts = ["a", "a", "a", "b"]
    rates = WinRate(Brightness()).score(images, prompts)
    torch.testing.assert_close(rates, torch.tensor([0.0, 1.0, 0.5, 0.5]))
    ranks = ParetoRank({"red": Brightness(0), "green": Brightness(1)}).score(images, prompts)
    assert ranks.tolist() == [0.0, 0.0, -1.0, 0.0]


@given(SCORES, st.floats(0, 5))
@settings(max_examples=50, deadline=None)
def test_win_rates_share_out_all_duels(values: list[int], margin: float) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    rates = win_rates(scores, margin)
    assert rates.mean().item() == pytest.approx(0.5)
    assert torch.allclose(win_rates(scores.exp()), win_rates(scores))


def test_duels_that_nobody_could_decide_count_for_neither() -> None:
    pairs, points = torch.tensor([[0, 1], [2, 0], [1, 2]]), torch.tensor([1.0, 0.5, float("nan")])
    assert duel_win_rates(pairs, points, 4).tolist() == [0.75, 0.25, 0.5, 0.5]


@given(st.integers(1, 12), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_pareto_front(count: int, rewards: int, seed: int) -> None:
    scores = torch.randint(0, 4, (count, rewards), generator=torch.Generator().manual_seed(seed)).double()
    ranks = pareto_ranks(scores)
    front = ranks == 0
    assert front.any()
    assert torch.equal(pareto_ranks(scores.exp()), ranks)
    # Every item outside the front is dominated by a member of it, no member by anyone.
    beats = dominates(scores)
    assert not beats[:, front].any()
    assert beats[front][:, ~front].any(0).all()
