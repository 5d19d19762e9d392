"""The golden runner itself: cases that are wrong, unknown or unreadable fail, and each is one item."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.golden_cases import diffusion_dpo
from tests.golden_cases.base import GoldenCase, compare
from tests.golden_cases.llm import dpo, simpo

ROOT = Path(__file__).resolve().parents[2]
RECORD: dict[str, Any] = json.loads((ROOT / "tests/golden/diffusion_dpo.json").read_text())["cases"][0]


def planted(**changes: Any) -> dict[str, Any]:
    """The first case of Diffusion-DPO under another name, with parts of its records replaced."""
    record = copy.deepcopy(RECORD)
    for part, values in changes.items():
        if isinstance(values, dict):
            record[part].update(values)
        else:
            record[part] = values
    return record


def rescheduled(**changes: Any) -> dict[str, Any]:
    """The first case of DDPO with another scheduler."""
    return {**STEP, "params": {**STEP["params"], "scheduler": {**STEP["params"]["scheduler"], **changes}}}


STEP, TRACKER = json.loads((ROOT / "tests/golden/ddpo.json").read_text())["cases"][:2]
PLANTED = {
    "right": planted(),
    "wrong_number": planted(expected={"loss": RECORD["expected"]["loss"] * 1.001}),
    "wrong_input": planted(params={"beta_dpo": 2001.0}),
    "wrong_shape": planted(expected={"inside_term": RECORD["expected"]["inside_term"][:2]}),
    "unknown_parameter": planted(params={"gamma": 1.0}),
    "unknown_input": planted(inputs={"mask": [1.0]}),
    "unknown_text": planted(params={"method": "dpo2"}),
    "unknown_dtype": planted(params={"dtype": "torch.int8"}),
    "unknown_expectation": planted(expected={"accuracy": 1.0}),
    "unknown_key_of_a_case": planted(weight=1.0),
    "truth_for_a_number": planted(params={"beta_dpo": True}),
    "nothing_expected": {**RECORD, "expected": {}},
}
NESTED = {
    "right": STEP,
    "unknown_key_of_a_parameter": rescheduled(thresholding=False),
    "unknown_text_in_a_parameter": rescheduled(beta_schedule="linear"),
    "no_record": rescheduled(steps_offset={}),
    "unknown_key_of_an_input": {
        **TRACKER,
        "inputs": {"updates": [{**update, "steps": 1} for update in TRACKER["inputs"]["updates"]]},
    },
}


class Verdicts:
    """Collects the outcome of each item by its id."""

    def __init__(self) -> None:
        self.passed: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.passed[report.nodeid.partition("[")[2].rstrip("]")] = report.passed


def test_each_case_is_one_item_and_only_right_ones_pass(tmp_path: Path) -> None:
    for file, records in {"diffusion_dpo": PLANTED, "ddpo": NESTED}.items():
        cases = [{**record, "name": name} for name, record in records.items()]
        (tmp_path / f"{file}.json").write_text(json.dumps({"cases": cases}))
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "unheard_of.json").write_text(json.dumps({"cases": [{**RECORD, "name": "any"}]}))
    (tmp_path / "mapo.json").write_text("{")
    for name, cases in {"inpo": [1], "smpo": {"a": 1}, "dcpo": "abc"}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({"cases": cases}))
    elsewhere = tmp_path.with_name("elsewhere")
    elsewhere.mkdir()
    (elsewhere / "diffusion_dpo.json").write_text(json.dumps({"cases": [{**RECORD, "name": "any"}]}))
    (tmp_path / "linked").symlink_to(elsewhere)
    verdicts = Verdicts()
    runner = str(ROOT / "tests/test_golden.py")
    code = pytest.main([runner, "--golden", str(tmp_path), "-p", "no:cacheprovider"], plugins=[verdicts])
    assert code == pytest.ExitCode.TESTS_FAILED
    expected = {f"diffusion_dpo.json::{name}": name == "right" for name in PLANTED}
    expected |= {f"ddpo.json::{name}": name == "right" for name in NESTED}
    expected |= {"deep/unheard_of.json::any": False, "linked/diffusion_dpo.json::any": False}
    expected |= {f"{name}.json::unreadable": False for name in ("mapo", "inpo", "smpo", "dcpo")}
    assert verdicts.passed == expected


def test_a_folder_without_files_is_a_mistake_in_the_call(tmp_path: Path) -> None:
    code = pytest.main([str(ROOT / "tests/test_golden.py"), "--golden", str(tmp_path), "-p", "no:cacheprovider"])
    assert code in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED)


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (torch.tensor([1.0, 2.0]), [1, 2]),
        (torch.tensor(3), 3.0),
        ({"a": torch.tensor([0.5]), "b": "text"}, {"a": [0.5], "b": "text"}),
        ([{"x": 1}, {"x": 2}], [{"x": 1.000001}, {"x": 2}]),
        (True, True),
        (None, None),
        (float("inf"), float("inf")),
    ],
)
def test_equal_values(got: Any, want: Any) -> None:
    compare(got, want, 1e-5, "value")


@pytest.mark.parametrize(
    ("got", "want"),
    [
        (torch.tensor([1.0, 2.0]), [[1, 2]]),
        (torch.tensor([1.0]), 1.0),
        (1.0, [1.0]),
        (float("nan"), 1.0),
        (1.00003, 1.0),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1, "b": 2}, {"a": 1}),
        (True, 1.0),
        (1, True),
        ("text", "test"),
        ("ab", ["a", "b"]),
        (0.0, None),
    ],
)
def test_different_values(got: Any, want: Any) -> None:
    with pytest.raises(AssertionError, match="value"):
        compare(got, want, 1e-5, "value")


def test_inputs_are_double_unless_the_case_says_otherwise() -> None:
    assert GoldenCase.of("f", RECORD).tensor("target").dtype == torch.float64
    single = GoldenCase.of("f", planted(params={"dtype": "torch.float32"}, inputs={"whole": [1, 2.0], "part": [1.4]}))
    assert single.tensor("target").dtype == torch.float32
    assert single.integers("whole").tolist() == [1, 2]
    with pytest.raises(ValueError, match="expected whole numbers"):
        single.integers("part")
    with pytest.raises(ValueError, match="from 0 to 1"):
        single.indices("whole", 2)


def variant(file: str, **changes: Any) -> GoldenCase:
    """The first case of a file with parts of its records replaced; what is None is left out."""
    record = json.loads((ROOT / f"tests/golden/{file}").read_text())["cases"][0]
    for part, values in changes.items():
        merged = {**record[part], **values}
        record[part] = {name: value for name, value in merged.items() if value is not None}
    return GoldenCase.of(file, record)


def test_completions_of_two_lengths_and_smoothing_that_trl_ignores() -> None:
    first = variant("llm/dpo.json")
    assert not any(row[-1] for row in first.inputs["rejected_mask"])
    names = "policy_rejected", "ref_rejected", "rejected_mask"
    shorter = {name: [row[:-1] for row in first.inputs[name]] for name in names}
    gradient = {"grad_policy_rejected": [row[:-1] for row in first.expected["grad_policy_rejected"]]}
    case = variant("llm/dpo.json", inputs=shorter, expected=gradient, params={"label_smoothing": 0.1})
    case.check(dpo.run(case))


def test_in_a_mixture_only_what_trl_smooths_is_smoothed() -> None:
    def loss(**params: Any) -> Any:
        return dpo.run(variant("llm/dpo.json", params=params))["loss"]

    mixture = loss(loss_type=["sigmoid", "aot"], loss_weights=[0.5, 2.0], label_smoothing=0.1)
    parts = 0.5 * loss(loss_type=["sigmoid"]) + 2.0 * loss(loss_type=["aot"], label_smoothing=0.1)
    torch.testing.assert_close(mixture, parts)


def test_smoothing_that_the_official_hinge_of_simpo_ignores() -> None:
    plain, smoothed = (
        simpo.run(variant("llm/simpo.json", params={"loss_type": "hinge", "label_smoothing": smoothing}))
        for smoothing in (0.0, 0.1)
    )
    compare(smoothed, {name: value.tolist() for name, value in plain.items()}, 0.0, "hinge")  # type: ignore[attr-defined]


def test_a_derived_number_may_be_rounded_within_the_tolerance_only() -> None:
    gamma = variant("llm/simpo.json").params["gamma"]
    case = variant("llm/simpo.json", params={"gamma": gamma + 1e-8})
    case.check(simpo.run(case))
    with pytest.raises(AssertionError, match="gamma"):
        simpo.run(variant("llm/simpo.json", params={"gamma": gamma + 1e-4}))


def test_ties_are_counted_as_the_official_code_of_diffusion_dpo_does() -> None:
    same = {"ref_pred": RECORD["inputs"]["policy_pred"]}
    expected = dict.fromkeys(RECORD["expected"]) | {"implicit_acc": 0.0, "loss": math.log(2)}
    case = variant("diffusion_dpo.json", inputs=same, expected=expected)
    case.check(diffusion_dpo.run(case))
