"""What is exported loads in the programs it is for, with the same tensors and the same predictions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from diffalign.cli.main import main
from diffalign.errors import UserError
from diffalign.export.formats import Format, export
from diffalign.export.kohya import KohyaNames
from diffalign.policies.adapters import DEFAULT_ADAPTER, LoraSettings
from diffalign.policies.loading import load_policy
from diffalign.policies.saving import LORA_FILE, PIPELINE_METADATA, read_lora_metadata
from tests.factories import save_tiny

NAMES: dict[str, list[str]] = json.loads((Path(__file__).parent / "kohya_names.json").read_text(encoding="utf-8"))
UNET = (
    "to_q", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv",
    "conv_in", "conv_out", "time_embedding.linear_1",
)  # fmt: skip
TARGETS = {"sd": UNET, "sdxl": (*UNET, "add_embedding.linear_2"), "sd3": ()}
RANK, ALPHA = 4, 6.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What a run of each family leaves, its weights drawn at random."""
    folder = tmp_path_factory.mktemp("runs")
    for family, targets in TARGETS.items():
        whole = {"t5": True} if family == "sd3" else {}  # stock pipelines want all their parts
        policy = load_policy(save_tiny(family, folder / f"tiny-{family}", **whole))
        policy.adapters.add(DEFAULT_ADAPTER, LoraSettings(RANK, ALPHA, targets=targets))
        generator = torch.Generator().manual_seed(0)
        for parameter in policy.adapters.parameters():
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
        policy.save(folder / family, {"method": "mapo", "train_steps": "7"})
    return {family: folder / family for family in TARGETS}


def stock(run: Path, weights: Path | None = None) -> Any:
    """The stock pipeline of a run's base, with a file that diffusers loads."""
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(read_lora_metadata(run / LORA_FILE)["base_model"])
    pipeline.set_progress_bar_config(disable=True)
    if weights is not None:
        pipeline.load_lora_weights(weights)
    return pipeline


def latents(pipeline: Any) -> Tensor:
    """What two steps of a pipeline lead to."""
    generator = torch.Generator().manual_seed(1)
    options = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "latent"}
    return pipeline("ab c", generator=generator, **options).images


def expected(run: Path) -> Tensor:
    return latents(stock(run, run / LORA_FILE))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_kohyas_file_has_the_agreed_names_and_loads(family: str, runs: dict[str, Path], tmp_path: Path) -> None:
    run = runs[family]
    file = export(run, "kohya", tmp_path / "deep" / "x.safetensors")
    state = load_file(file)
    parts = ("lora_down.weight", "lora_up.weight", "alpha")
    assert set(state) == {f"{layer}.{part}" for layer in NAMES[family] for part in parts}
    assert all(value == ALPHA for name, value in state.items() if name.endswith(".alpha"))
    loaded = stock(run, file)
    own = load_file(run / LORA_FILE)
    factors = {name: value for name, value in loaded.unet.state_dict().items() if ".lora_" in name}
    back = {f"unet.{name.replace('.default_0', '')}": value for name, value in factors.items()}
    assert back.keys() == own.keys()
    assert all(torch.equal(back[name], own[name]) for name in own)
    torch.testing.assert_close(latents(loaded), expected(run))
    assert not torch.allclose(latents(loaded), latents(stock(run)), atol=1e-2)


@pytest.mark.parametrize("family", list(TARGETS))
def test_diffusers_file_loads(family: str, runs: dict[str, Path], tmp_path: Path) -> None:
    file = export(runs[family], "diffusers", tmp_path / "x.safetensors")
    assert torch.equal(latents(stock(runs[family], file)), expected(runs[family]))


@pytest.mark.parametrize("family", list(TARGETS))
def test_pefts_folder_loads(family: str, runs: dict[str, Path], tmp_path: Path) -> None:
    from peft import PeftModel

    folder = export(runs[family], "peft", tmp_path / "x")
    pipeline = stock(runs[family])
    network = pipeline.transformer if family == "sd3" else pipeline.unet
    PeftModel.from_pretrained(network, folder)  # puts its layers into the network itself
    torch.testing.assert_close(latents(pipeline), expected(runs[family]))


@pytest.mark.parametrize("family", list(TARGETS))
def test_a_merged_pipeline_is_an_ordinary_one(family: str, runs: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import DiffusionPipeline

    folder = export(runs[family], "merged", tmp_path / "x")
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    network = pipeline.transformer if family == "sd3" else pipeline.unet
    assert not any("lora" in name for name in network.state_dict())
    torch.testing.assert_close(latents(pipeline), expected(runs[family]), rtol=1e-4, atol=1e-4)
    assert json.loads((folder / PIPELINE_METADATA).read_text(encoding="utf-8"))["method"] == "mapo"
    assert not list(folder.rglob("*.tmp"))


def test_the_header_says_where_the_weights_come_from(runs: dict[str, Path], tmp_path: Path) -> None:
    file = export(runs["sdxl"], "kohya", tmp_path / "x.safetensors", torch.float16)
    header = read_lora_metadata(file)
    stated = {name: header[name] for name in ("method", "rank", "alpha", "train_steps", "ss_base_model_version")}
    assert stated == {
        "method": "mapo", "rank": "4", "alpha": "6.0", "train_steps": "7", "ss_base_model_version": "sdxl_base_v1-0",
    }  # fmt: skip
    assert header["base_model"] == str(runs["sdxl"].parent / "tiny-sdxl")
    with safe_open(file, "pt") as opened:
        types = {opened.get_tensor(name).dtype for name in opened.keys() if not name.endswith(".alpha")}  # noqa: SIM118
    assert types == {torch.float16}


def test_blocks_of_the_real_xl_are_numbered_as_in_the_original() -> None:
    """Blocks of sd-scripts' SDXL network, all 794 layers of which were compared once (282 of SD 1.5's), with shapes."""
    config = {"layers_per_block": 2, "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")}
    names = KohyaNames(config, xl=True)
    expected_names = {
        "down_blocks.1.attentions.0.proj_in": "input_blocks_4_1_proj_in",
        "down_blocks.2.attentions.1.proj_in": "input_blocks_8_1_proj_in",
        "mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "up_blocks.0.attentions.2.proj_in": "output_blocks_2_1_proj_in",
        "up_blocks.1.attentions.0.proj_in": "output_blocks_3_1_proj_in",
        "down_blocks.0.resnets.1.time_emb_proj": "input_blocks_2_0_emb_layers_1",
        "down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
        "mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
        "up_blocks.2.resnets.2.conv_shortcut": "output_blocks_8_0_skip_connection",
    }
    assert {path: names.name(path) for path in expected_names} == {
        path: f"lora_unet_{name}" for path, name in expected_names.items()
    }


@pytest.mark.parametrize(
    ("run", "form", "output", "message"),
    [
        ("sd3", "kohya", "x.safetensors", "no agreed names for Stable Diffusion 3: export with --format diffusers"),
        ("tiny-sd", "kohya", "x.safetensors", "holds all weights of a model, not an adapter"),
        ("nowhere", "peft", "x", "there is no image adapter in"),
        ("sd", "kohya", "x", "writes one file: give --output NAME.safetensors"),
        ("sd", "peft", "full", "exists: --format peft writes a folder of its own"),
    ],
)
def test_what_cannot_be_exported_is_refused(
    run: str, form: Format, output: str, message: str, runs: dict[str, Path], tmp_path: Path
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep", encoding="utf-8")
    with pytest.raises(UserError, match=message) as refused:
        export(runs["sd"].parent / run, form, tmp_path / output)
    assert "\n" not in str(refused.value)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["full", "mine.txt"]


def test_the_command(runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "x.safetensors"
    assert main(["export", str(runs["sd"]), "--format", "kohya", "--output", str(target)]) == 0
    assert capsys.readouterr().out == f"wrote {target}\n"
    assert target.is_file()
