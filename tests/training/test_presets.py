"""Published presets: whose they are, what they hold, how a user's options go with them, and runs under them."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers import UNet2DConditionModel
from peft import LoraConfig, inject_adapter_in_model
from rich.console import Console

import diffalign
from diffalign.cli.parser import parse_train
from diffalign.errors import UserError
from diffalign.training.config import OptimOptions
from diffalign.training.memory import Networks, estimate, saved_bytes
from diffalign.training.presets import PRESETS, PUBLISHED, find_preset, preset_name, preset_names, read_preset
from diffalign.training.resolve import resolve_config
from tests.factories import Ripples, save_tiny

FILES = sorted(path for name in PUBLISHED for path in (PRESETS / name).glob("*.yaml"))
OF_METHODS = [path for path in FILES if path.stem != "_common"]
MODELS = {"sd15": "sd", "sdxl": "sdxl", "sdxl-turbo": "sdxl", "sd3": "sd3"}
CASES = [
    (path.parent.name, path.stem, mode)
    for path in OF_METHODS
    for mode in ("lora", "full")
    if mode in yaml.safe_load(path.read_text())
]


@pytest.mark.parametrize(("preset", "method", "mode"), CASES, ids="-".join)
def test_a_preset_resolves_for_its_method(preset: str, method: str, mode: str) -> None:
    """Options are known and of their types, and nothing else is said than what is in the file."""
    found = read_preset(preset, method, mode)
    stated = found.options
    assert found.whole
    alone = resolve_config(method, {**stated, "preset": "none"}).flat()
    assert stated == {name: alone[name] for name in stated}
    config = resolve_config(method, {"preset": preset, "train_mode": mode})
    flat = config.flat()
    assert {name: flat[name] for name in stated} == stated
    assert (config.model.preset, config.model.train_mode) == (preset, mode)
    assert "learning_rate" in stated
    assert "max_train_steps" in stated


def test_rates_of_a_preset_may_be_written_without_a_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "sft.yaml").write_text("learning_rate: 3e-4\n")
    monkeypatch.setattr("diffalign.training.presets.PRESETS", tmp_path)
    assert resolve_config("sft", {"preset": "mine"}).optim.learning_rate == 3e-4


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_file_says_where_its_values_come_from(path: Path) -> None:
    assert path.read_text().startswith("# ")
    values = yaml.safe_load(path.read_text())
    for mode in ("lora", "full"):
        assert mode not in values or "train_mode" not in values[mode]


@pytest.mark.parametrize(
    ("model", "preset", "expected"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", None, "sd15"),
        ("runwayml/stable-diffusion-v1-5", None, "sd15"),
        ("stabilityai/stable-diffusion-xl-base-1.0", None, "sdxl"),
        ("stabilityai/stable-diffusion-3.5-medium", None, "sd3"),
        ("tiny-sd", None, "tiny-sd"),
        ("tiny-sd", "none", None),
        ("somebody/model", None, None),
        ("models/runwayml/stable-diffusion-v1-5", None, None),  # nothing is guessed from a path
        ("sdxl", None, None),
        ("models/mine", "sdxl", "sdxl"),
        ("runwayml/stable-diffusion-v1-5", "sdxl", "sdxl"),
    ],
)
def test_whose_preset_it_is(model: str, preset: str | None, expected: str | None) -> None:
    assert preset_name(model, preset) == expected


@pytest.mark.parametrize("model", [name for names in PUBLISHED.values() for name in names])
def test_a_method_without_published_values_has_those_of_the_model(model: str) -> None:
    config = resolve_config("tdpo", {"pretrained_model_name_or_path": model})
    assert (config.optim.mixed_precision, config.model.gradient_checkpointing) == ("fp16", True)
    assert (config.optim.max_train_steps, config.optim.learning_rate) == (0, OptimOptions().learning_rate)
    assert config.run.checkpointing_steps > 0
    assert find_preset(model, "tdpo").whole is False  # type: ignore[union-attr]


def test_sdxls_adapters_fit_into_24_gib() -> None:
    """By the estimate of a dry run, for a network of the real size without values, and one pair a pass."""
    options = resolve_config("diffusion_dpo", {"preset": "sdxl"}).flat()
    with torch.device("meta"):
        network = UNet2DConditionModel(
            sample_size=128, block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), cross_attention_dim=2048,
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        ).half().requires_grad_(False)  # fmt: skip
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        inject_adapter_in_model(LoraConfig(r=options["rank"], target_modules=targets), network)
    trained = [p for name, p in network.named_parameters() if "lora_" in name]
    for parameter in trained:
        parameter.data = parameter.data.float()
    network.train().enable_gradient_checkpointing()

    def a_row(ghost: torch.nn.Module) -> torch.Tensor:
        def empty(*shape: int) -> torch.Tensor:
            return torch.empty(1, *shape, dtype=torch.float16, device="meta")

        sizes = {"text_embeds": empty(1280), "time_ids": empty(6)}
        time = torch.zeros(1, device="meta")
        return ghost(empty(4, 128, 128), time, empty(77, 2048), added_cond_kwargs=sizes, return_dict=False)[0]

    count = sum(p.numel() for p in trained)
    needed = estimate(Networks(network), count, options, saved_bytes(network, a_row), 2 * options["train_batch_size"])
    assert 5 < needed.total / 2**30 < 12  # beside it text encoders, which wait in main memory, and a VAE of 0.3 GiB


def test_one_step_models_are_sampled_in_one_step() -> None:
    for name in ("stabilityai/sd-turbo", "stabilityai/sdxl-turbo"):
        run = resolve_config("diffusion_dpo", {"pretrained_model_name_or_path": name}).run
        assert (run.num_inference_steps, run.guidance_scale) == (1, 1.0)
    turbo = {"pretrained_model_name_or_path": "stabilityai/sdxl-turbo", "train_mode": "full"}
    assert resolve_config("diffusion_dpo", turbo).method_config.few_step_timesteps == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--preset", "sdlx"], "unknown preset 'sdlx': did you mean 'sdxl'?"),
    ],
)
def test_presets_that_are_not_there_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        parse_train(["--method", "diffusion_dpo", *words], "image", "x")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_the_users_options_come_first() -> None:
    words = ["--method", "diffusion_dpo", "--preset", "sd15"]
    config = parse_train([*words, "--beta", "7", "--train_mode", "full"], "image", "x")
    assert (config.method_config.beta, config.optim.learning_rate, config.optim.scale_lr) == (7.0, 1e-8, "linear")
    assert config == resolve_config("diffusion_dpo", {"preset": "sd15", "beta": 7.0, "train_mode": "full"})


def test_what_says_the_same_in_another_way_replaces_a_presets_value() -> None:
    """Three numbers of a batch contradict each other only where a user gives all three."""
    words = ["--method", "diffusion_dpo", "--preset", "sd15", "--gradient_accumulation_steps", "2"]
    config = parse_train([*words, "--num_train_epochs", "3"], "image", "x")
    assert (config.optim.gradient_accumulation_steps, config.optim.global_batch_pairs) == (2, 0)
    assert (config.optim.num_train_epochs, config.optim.max_train_steps) == (3, 0)
    both = parse_train([*words, "--global_batch_pairs", "8"], "image", "x")
    assert both.optim.global_batch_pairs == 8


def test_the_printed_configuration_names_the_preset(tmp_path: Path) -> None:
    config = parse_train(["--method", "mapo", "--preset", "sdxl", "--rank", "2"], "image", "x")
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config.flat()))
    assert yaml.safe_load(path.read_text())["preset"] == "sdxl"
    assert parse_train(["--config", str(path)], "image", "x") == config
    assert set(PUBLISHED) < set(preset_names())


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("models")
    return {preset: str(save_tiny(family, folder / family)) for preset, family in MODELS.items()}


@pytest.mark.parametrize(
    ("preset", "method", "changes"),
    [
        ("sd15", "diffusion_dpo", {}),
        ("sd15", "diffusion_dpo", {"train_mode": "full"}),
        ("sd15", "d3po", {"rewards": "incompressibility", "rollout_steps": 2}),
        ("sd15", "alignprop", {"rewards": {"ripples": Ripples()}, "rollout_steps": 2}),
        ("sd15", "dro", {"train_mode": "full", "rollout_steps": 2}),
        ("sdxl", "mapo", {}),
        ("sdxl", "diffusion_dpo", {"train_mode": "full"}),
        ("sdxl-turbo", "diffusion_dpo", {"train_mode": "full"}),
        ("sd3", "diffusion_dpo", {}),
        ("sd3", "mapo", {}),
        ("sd3", "flow_grpo", {"rewards": "incompressibility", "rollout_steps": 2, "images_per_prompt": 2}),
    ],
)
def test_two_steps_under_a_preset(
    preset: str, method: str, changes: dict[str, Any], models: dict[str, str], pairs: str, tmp_path: Path
) -> None:
    """Only the size of the run is changed; half precision is for accelerators."""
    small = {"max_train_steps": 2, "train_batch_size": 2, "global_batch_pairs": 2, "resolution": 16}
    quiet = {"num_validation_images": 0, "mixed_precision": "no", "output_dir": str(tmp_path / "run")}
    model = {"pretrained_model_name_or_path": models[preset], "preset": preset}
    result = diffalign.train(
        pairs, method=method, console=Console(file=io.StringIO()), **{**small, **quiet, **model, **changes}
    )
    recorded = yaml.safe_load((result.folder / "config.yaml").read_text())
    assert result.steps == 2
    assert recorded["preset"] == preset
    stated = read_preset(preset, method, changes.get("train_mode", "lora")).options
    kept = stated.keys() - {*small, *quiet, *changes}
    assert {name: recorded[name] for name in kept} == {name: stated[name] for name in kept}
