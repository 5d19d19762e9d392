"""Judges: reading answers, asking servers that fail, never asking twice, a real model class."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffalign.errors import UserError
from diffalign.rewards.compose import RewardSpec, parse_rewards
from diffalign.rewards.endpoint import Endpoint, EndpointOptions
from diffalign.rewards.judge_formats import axis_scores, final_score, mean_of_axes, pair_shares, pair_verdict
from diffalign.rewards.judges import PairJudge, PointJudge, VqaScore, consistent
from diffalign.rewards.loading import load_reward
from diffalign.rewards.local_vlm import LocalModel
from diffalign.rewards.vlm import Answer, NotAnswered, Question, Transcript, VisionLanguageModel, transcripts_folder
from tests.rewards.judge_support import fake_server, save_tiny_llava

RED, BLUE, GREY = (Image.new("RGB", (28, 28), colour) for colour in ("red", "blue", "grey"))


@pytest.fixture(autouse=True)
def _transcripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFALIGN_TRANSCRIPTS", str(tmp_path / "transcripts"))


class Canned(VisionLanguageModel):
    """Answers by a rule on the pictures' colours."""

    def __init__(self, answers: Mapping[Any, str], name: str = "canned") -> None:
        self.name, self.answers, self.asked = name, answers, 0

    def ask(self, questions: Sequence[Question]) -> list[Answer | NotAnswered]:
        self.asked += len(questions)
        keys = [tuple(picture.getpixel((0, 0)) for picture in question.pictures) for question in questions]
        return [Answer(self.answers[key]) if key in self.answers else NotAnswered("it was away") for key in keys]


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("red circle (object): 1\nFinal Score: 4", 4.0),
        ("**Final Score:** 3.5", 3.5),
        ("final score (1-5): **2**", 2.0),
        ("Final Score: 2\nno, wait.\nFinal Score:   5 ", 5.0),
        ("Final Score: 10", math.nan),
        ("Final Score: 0", math.nan),
        ("Final Score: 5.5", math.nan),
        ("I cannot say.", math.nan),
    ],
)
def test_final_scores_are_read(text: str, score: float) -> None:
    assert final_score(text) == pytest.approx(score, nan_ok=True)


def test_axes_are_read_and_averaged() -> None:
    text = "Alignment Score (1-5): 4\n*Coherence Score (1-5)*: 3.5\nstyle score: 1.5"
    assert axis_scores(text) == {"Alignment": 4.0, "Coherence": 3.5, "Style": 1.5}
    assert mean_of_axes(text) == pytest.approx(3.0)
    assert mean_of_axes(text, {"Alignment": 3.0, "Style": 1.0}) == pytest.approx(3.375)
    assert math.isnan(mean_of_axes("Alignment Score (1-5): 4"))


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Image 1 is better than Image 2.", 1.0),
        ("**image 2 is  better** than image 1", 0.0),
        ("Both images are equally good.", 0.5),
        ("<think>Image 1 is better</think><answer> Image 2 is better </answer>", 0.0),
        ("<answer>Image 2 is better</answer> or <answer>Image 1 is better</answer>", 1.0),
        ("<think>Image 1 is better</think>", math.nan),
        ("They differ.", math.nan),
    ],
)
def test_verdicts_are_read(text: str, verdict: float) -> None:
    assert pair_verdict(text) == pytest.approx(verdict, nan_ok=True)


def test_shares_sum_to_one_even_if_the_answer_does_not() -> None:
    text = "Alignment: Image 1: 0.6, Image 2: 0.4\nStyle: Image 1: 0.9 / Image 2: 0.9"
    assert pair_shares(text) == pytest.approx((0.6 + 0.5) / 2)
    assert math.isnan(pair_shares("Image 1: 0.6"))


def test_answers_that_cannot_be_read_are_nan_and_counted() -> None:
    answers = {((255, 0, 0),): "Final Score: 4", ((0, 0, 255),): "hm"}
    judge = PointJudge(Transcript(Canned(answers)), "{caption}", final_score, "unified_reward")
    scores = judge.score_pictures([RED, BLUE], ["a", "a"])
    assert scores[0].item() == pytest.approx(0.8)
    assert scores[1].isnan()
    assert judge.unread == 1
    tensor = torch.zeros(1, 3, 28, 28)
    tensor[:, 0] = 1
    assert judge.score(tensor, ["a"]).tolist() == pytest.approx([0.8])


def test_a_judge_that_favours_a_place_decides_nothing() -> None:
    assert [consistent(*pair) for pair in ((1, 0), (0, 1), (1, 1), (0.5, 0.5), (1, 0.5))] == [1, 0, 0.5, 0.5, 0.5]
    assert math.isnan(consistent(1.0, math.nan))
    red, blue, grey = (255, 0, 0), (0, 0, 255), (128, 128, 128)
    first, second = "Image 1 is better than Image 2.", "Image 2 is better than Image 1."
    answers = {(red, blue): first, (blue, red): second, (red, grey): first, (grey, red): second}
    # Of blue and grey always the first one named.
    answers |= {(blue, grey): first, (grey, blue): first}
    judge = PairJudge(Transcript(Canned(answers)))
    scores = judge.score_pictures([RED, BLUE, GREY, RED], ["x", "x", "x", "alone"])
    assert scores.tolist() == [1.0, 0.25, 0.25, 0.5]
    assert judge.unread == 0
    answers[grey, blue] = "no idea"
    garbled = PairJudge(Transcript(Canned(answers, name="garbled")))
    assert garbled.score_pictures([RED, BLUE, GREY], ["x"] * 3).tolist() == [1.0, 0.25, 0.25]
    assert (garbled.unread, garbled.answers) == (1, 3)
    swapped = judge.compare([BLUE, GREY], [RED, BLUE], ["x", "x"])
    assert swapped.tolist() == [0.0, 0.5]


def test_nothing_is_asked_twice_and_partial_answers_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    model = Canned({((255, 0, 0),): "Final Score: 4"})
    with pytest.raises(UserError, match=r"1 of 2 questions to canned are unanswered: it was away\. .*answers\.jsonl"):
        Transcript(model, path).ask([Question([RED], "?"), Question([BLUE], "?")])
    with path.open("a") as file:
        file.write('{"key": "cut off')
    again = Canned({((0, 0, 255),): "Final Score: 2"})
    answers = Transcript(again, path).ask([Question([RED], "?"), Question([BLUE], "?"), Question([BLUE], "?")])
    assert [answer.text for answer in answers] == ["Final Score: 4", "Final Score: 2", "Final Score: 2"]
    assert again.asked == 1
    other = Canned({((255, 0, 0),): "Final Score: 1"})
    reworded = Transcript(other, path).ask([Question([RED], "?", template="new")])
    assert reworded[0].text == "Final Score: 1"


def quick(address: str, tries: int = 3) -> tuple[Endpoint, list[float]]:
    pauses: list[float] = []
    return Endpoint(address, EndpointOptions(timeout=5, tries=tries), key="secret", pause=pauses.append), pauses


def test_an_endpoint_is_asked_with_pictures_first_and_tried_again() -> None:
    states = iter([(500, "busy"), (429, "slower"), (200, "Final Score: 3")])
    with fake_server(lambda body: next(states)) as server:
        endpoint, pauses = quick(server.address)
        (answer,) = endpoint.ask([Question([RED, BLUE], "which?")])
    assert answer == Answer("Final Score: 3")
    assert pauses == [1.0, 2.0]
    body = server.requests[0]
    kinds = [part["type"] for part in body["messages"][0]["content"]]
    assert kinds == ["image_url", "image_url", "text"]
    assert body["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("judge", 0, 4096)


def test_probabilities_of_words_come_from_the_likeliest_spelling() -> None:
    top = [("Yes", -0.5), (" yes", -0.6), (" Yes", -0.1), ("Maybe", -3.0)]
    content = [{"token": "Yes", "top_logprobs": [{"token": token, "logprob": value} for token, value in top]}]
    choice = {"message": {"content": "Yes"}, "logprobs": {"content": content}}
    with fake_server(lambda body: (200, {"choices": [choice]})) as server:
        score = VqaScore(Transcript(quick(server.address)[0]))
        assert score.score_pictures([RED], ["a red circle"]).item() == pytest.approx(math.exp(-0.1))
        assert VqaScore(score.transcript, normalised=True).score_pictures([RED], ["a red circle"]).item() == 1.0
    assert len(server.requests) == 1
    assert server.requests[0]["messages"][0]["content"][-1]["text"].startswith('Does this figure show "a red circle"?')
    assert server.requests[0]["top_logprobs"] == 20


def broken_off(body: Mapping[str, Any]) -> tuple[int, str]:
    """Let the connection end without an answer."""
    raise RuntimeError("the server fell over")


def test_endpoints_that_fail_say_why() -> None:
    def reason(address: str, tries: int = 2) -> str:
        (answer,) = quick(address, tries)[0].ask([Question([RED], "?")])
        assert isinstance(answer, NotAnswered)
        return answer.reason

    with fake_server(lambda body: (404, {"error": "no such model"})) as server:
        assert "after 1 of 2 tries (status 404" in reason(server.address)
        assert Endpoint(server.address.partition("#")[0]).name == "listed-model"
    assert "did not answer after 2 of 2 tries (" in reason(server.address)
    with fake_server(lambda body: (200, {"unheard": "of"})) as server:
        assert "another format than OpenAI's" in reason(server.address)

    def slow(body: Mapping[str, Any]) -> tuple[int, str]:
        time.sleep(0.5)
        return 200, "late"

    with fake_server(broken_off) as server:
        assert "did not answer after 2 of 2 tries (" in reason(server.address)
    with pytest.raises(UserError, match="at least 1"):
        EndpointOptions(tries=0)
    with fake_server(slow) as server:
        hasty = Endpoint(server.address, EndpointOptions(timeout=0.1, patience=0.0, tries=1))
        (answer,) = hasty.ask([Question([RED], "?")])
        assert isinstance(answer, NotAnswered)
        assert "no answer within 0.1 s" in answer.reason


def test_a_command_goes_on_where_the_endpoint_left_it(tmp_path: Path) -> None:
    def reply(body: Mapping[str, Any]) -> tuple[int, str]:
        text = body["messages"][0]["content"][-1]["text"]
        return (400, "refused") if "blue" in text and not awake else (200, "Final Score: 5")

    awake = False
    with fake_server(reply) as server:
        reward = load_reward(f"unified_reward@{server.address}")
        with pytest.raises(UserError, match="1 of 2 questions to judge are unanswered"):
            reward.score_pictures([RED, BLUE], ["a red one", "a blue one"])
        kept = [json.loads(line) for line in (transcripts_folder() / "judge.jsonl").read_text().splitlines()]
        assert [row["text"] for row in kept] == ["Final Score: 5"]
        awake = True
        again = load_reward(f"unified_reward@{server.address}")
        assert again.score_pictures([RED, BLUE], ["a red one", "a blue one"]).tolist() == [1.0, 1.0]
    assert sum("red one" in r["messages"][0]["content"][-1]["text"] for r in server.requests) == 1


def test_addresses_in_compositions() -> None:
    assert parse_rewards("vqascore@http://localhost:8000/v1:0.5,graded") == [
        RewardSpec("vqascore", 0.5, "http://localhost:8000/v1"),
        RewardSpec("graded"),
    ]
    assert parse_rewards("vqascore@http://localhost:8000")[0].source == "http://localhost:8000"
    with pytest.raises(UserError, match="needs a vision-language model"):
        load_reward("unified_reward")
    with pytest.raises(UserError, match="is not the address of a server"):
        load_reward("vqascore@https://")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny_llava(tmp_path_factory.mktemp("llava"))


def test_a_local_model_gives_probabilities_and_text(llava: str) -> None:
    model = LocalModel.load(llava, max_new_tokens=4)
    score = VqaScore(Transcript(model))
    captions = ["red", "red circle ? red circle"]
    together = score.score_pictures([RED, BLUE], captions)
    assert ((together > 0) & (together < 1)).all()
    assert together[0] != together[1]
    for row, picture in enumerate((RED, BLUE)):
        alone = VqaScore(Transcript(model, Path(llava) / f"{row}.jsonl")).score_pictures(
            [picture], captions[row : row + 1]
        )
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=1e-4)
    other = VqaScore(Transcript(model)).score_pictures([BLUE], captions[:1])
    assert other != together[0]
    normalised = VqaScore(score.transcript, normalised=True).score_pictures([RED, BLUE], captions)
    assert (normalised > together).all()
    assert (normalised < 1).all()
    (answer,) = model.ask([Question([RED], "Does this figure show red ?")])
    assert isinstance(answer, Answer)
    assert len(answer.text.split()) <= 4


def test_local_models_that_will_not_do(llava: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot load the vision-language model"):
        load_reward(f"vqascore@{tmp_path}")
    model = LocalModel.load(llava)
    with pytest.raises(UserError, match="no single token for 'Perhaps so'"):
        model._first_tokens("Perhaps so")
