"""What the training command takes, offers, refuses and prints."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from diffalign.cli.parser import MAIN_OPTIONS, parse_train
from diffalign.strategies.registry import get_method, list_methods
from diffalign.training.config import option_defaults
from diffalign.training.presets import read_preset
from diffalign.training.resolve import resolve_config

OWN_METHOD = '''
from dataclasses import dataclass
from diffalign.strategies.registry import get_method, register

@dataclass(frozen=True)
class MineConfig:
    """Constants.

    Args:
        sharpness: how sharp. 3: made up.
    """
    sharpness: float = 3.0

@register("mine", summary="a method of my own", paper="none")
class Mine(get_method("sft").strategy):
    Config = MineConfig
'''


def test_help_without_a_method_is_an_overview(cli) -> None:
    answer = cli("train", "--help")
    assert answer.status == 0
    for method in list_methods("image"):
        assert f"  {method.name} " in answer.out
    for option in MAIN_OPTIONS:
        assert f"--{option}" in answer.out
    assert "--method NAME --help" in answer.out
    assert len(answer.out.splitlines()) < 25 + len(list_methods("image"))  # it fits on a screen


def test_help_of_the_text_command_offers_text_methods(cli) -> None:
    out = cli("train-text", "--help").out
    assert "simpo" in out
    assert "diffusion_dpo" not in out


@pytest.mark.parametrize("method", ["inpo", "rankdpo", "simpo"])
def test_help_of_a_method_describes_its_own_options_first(cli, method: str) -> None:
    record = get_method(method)
    command = "train" if record.strategy.spec.modality == "image" else "train-text"
    answer = cli(command, "--method", method, "--help")
    assert answer.status == 0
    assert record.summary in " ".join(answer.out.split())
    for name in option_defaults(record.strategy.Config):
        assert f"--{name}" in answer.out
    assert answer.out.index(f"options of {method}") < answer.out.index("optim options")


def test_help_shows_the_defaults_of_the_preset(cli) -> None:
    preset = read_preset("tiny-sd", "diffusion_dpo").options
    out = " ".join(cli("train", "--method", "diffusion_dpo", "--help").out.split())
    assert f"default: {preset['max_train_steps']}" in out


def test_no_words_at_all_show_help_and_fail(cli) -> None:
    assert cli().status == 2
    answer = cli("train")
    assert answer.status == 2
    assert "methods:" in answer.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean 'train'?"),
        (["train", "--seed", "3"], "--method is missing; choose one of: alignprop, d3po"),
        (["train", "--method", "inpoo"], "unknown method 'inpoo': did you mean 'inpo'?"),
        (["train", "--method", "simpo"], "'simpo' is a text method: use train_text.py"),
        (["train", "--method", "simppoo"], "'simppoo'; nearest here: smpo, seppo; 'simpo' is a text method: use"),
        (["train", "--method", "impo"], "'impo'; nearest here: smpo, mapo, inpo; 'simpo' is a text method: use"),
        (["train-text", "--method", "sft"], "'sft' is an image method: use train.py"),
        (["train-text", "--method", "difusion_dpo"], "unknown method 'difusion_dpo'; 'diffusion_dpo' is an image"),
        (["train", "--method", "inpo", "--learning_rte", "1e-4"], "did you mean 'learning_rate'?"),
        (["train", "--method", "inpo", "--learning_rate", "fast"], "learning_rate"),
        (["train", "--method", "inpo", "--rank", "2.5"], "rank"),
        (["train", "--method", "inpo", "--mixed_precision", "fp8"], "mixed_precision"),
        (["train", "--method", "inpo", "--rank", "0"], "--rank must be positive, not 0"),
        (["train", "--method", "inpo", "--config", "missing.yaml"], "missing.yaml"),
        (["train", "--method_file", "missing.py", "--method", "mine"], "no method file at missing.py"),
        (["data", "chek", "x"], "unknown action 'chek' on data: did you mean 'check'?"),
    ],
)
def test_mistakes_are_answered_with_one_line(refused, words: list[str], message: str) -> None:
    assert message in refused(*words)


def test_a_wrong_type_says_what_was_given_and_expected(refused) -> None:
    message = refused("train", "--method", "inpo", "--learning_rate", "fast")
    assert "fast" in message
    assert "float" in message


def test_configuration_files_that_are_no_mapping(refused, tmp_path: Path) -> None:
    broken, items = tmp_path / "broken.yaml", tmp_path / "items.yaml"
    broken.write_text("method: [inpo")
    items.write_text("- inpo\n")
    assert "is not valid YAML" in refused("train", "--config", broken)
    assert "must hold a mapping of options to values, not a list" in refused("train", "--config", items)


def test_an_unknown_option_in_a_file_is_refused_by_name(refused, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: inpo\nlearning_rte: 1.0e-4\n")
    assert "learning_rte" in refused("train", "--config", path)


def test_the_printed_configuration_is_the_configuration(cli, tmp_path: Path) -> None:
    words = ["--method", "diffusion_dpo", "--beta", "123", "--learning_rate", "2e-5", "--column_map", "{prompt: text}"]
    printed = cli("train", *words, "--print_config")
    assert printed.status == 0
    path = tmp_path / "run.yaml"
    path.write_text(printed.out)
    assert yaml.safe_load(printed.out)["method"] == "diffusion_dpo"
    assert parse_train(["--config", str(path)], "image", "x") == parse_train(words, "image", "x")


def test_later_options_override_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("method: diffusion_dpo\nbeta: 7.0\nrank: 3\nlearning_rate: 3e-4\n")
    config = parse_train(["--config", str(path), "--rank", "5"], "image", "x")
    assert config.optim.learning_rate == 3e-4
    assert (config.method, config.method_config.beta, config.model.rank) == ("diffusion_dpo", 7.0, 5)
    assert config.optim.max_train_steps == read_preset("tiny-sd", "diffusion_dpo").options["max_train_steps"]


def test_the_preset_belongs_to_the_model() -> None:
    named = parse_train(["--method", "inpo", "--pretrained_model_name_or_path", "somebody/model"], "image", "x")
    assert named.optim.max_train_steps == 0
    assert parse_train(["--method", "inpo"], "image", "x").optim.max_train_steps > 0


def test_command_line_and_python_agree() -> None:
    words = ["--method", "inpo", "--learning_rate", "1e-4", "--strict", "true", "--report_to", "[tensorboard]"]
    options = {"learning_rate": 1e-4, "strict": True, "report_to": ["tensorboard"]}
    assert parse_train(words, "image", "x") == resolve_config("inpo", options)


def test_one_value_stands_for_a_list_and_a_bare_switch_for_true() -> None:
    words = ["--method", "inpo", "--report_to", "wandb", "--dry_run", "--lora_targets=to_q", "--strict"]
    config = parse_train([*words, "--validation_prompts", "a red circle, and a star"], "image", "x")
    assert config.run.report_to == ["wandb"]
    assert config.run.validation_prompts == ["a red circle, and a star"]
    assert config.model.lora_targets == ["to_q"]
    assert config.run.dry_run
    assert config.data.strict
    assert not parse_train(["--method", "inpo", "--strict", "false"], "image", "x").data.strict


def test_a_method_file_of_ones_own(cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from diffalign.strategies import registry

    registry.list_methods()  # all are found before the table is exchanged
    monkeypatch.setattr(registry, "_METHODS", dict(registry._METHODS))
    path = tmp_path / "mine.py"
    path.write_text(OWN_METHOD)
    answer = cli("train", "--method_file", path, "--method", "mine", "--help")
    assert answer.status == 0
    assert "--sharpness" in answer.out
    config = parse_train(["--method_file", str(path), "--method", "mine", "--sharpness", "4"], "image", "x")
    assert config.method_config.sharpness == 4.0
