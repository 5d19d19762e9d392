"""From names to policies, and back to files that stock diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.training_utils import _collate_lora_metadata
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffalign.errors import UserError
from diffalign.policies.adapters import LoraSettings
from diffalign.policies.loading import FAMILIES, load_adapter, load_policy, resolve
from diffalign.policies.saving import LORA_FILE, read_lora, save_lora
from diffalign.policies.sd3 import SD3Policy
from diffalign.policies.unet import SDXLPolicy, UNetPolicy
from tests.factories import save_tiny, tiny_pipeline, tiny_policy
from tests.policies.test_pipelines import NOISE, our_sample, stock_sample

KINDS = {"sd": UNetPolicy, "sdxl": SDXLPolicy, "sd3": SD3Policy}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: save_tiny(family, tmp_path_factory.mktemp(family)) for family in KINDS}


def trained(folder: Path, adapter: str = "default") -> Any:
    policy = load_policy(folder)
    policy.adapters.add(adapter, LoraSettings(rank=3, alpha=6))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.adapters.parameters(adapter):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return policy


@pytest.mark.parametrize("family", KINDS)
class TestFamilies:
    def test_folder_gives_the_right_policy(self, family: str, models: dict[str, Path]) -> None:
        policy = load_policy(models[family])
        assert type(policy) is KINDS[family]
        assert policy.fingerprint() == tiny_policy(family).fingerprint()
        assert policy.dtype == torch.float32
        assert not any(p.requires_grad for p in policy.module.parameters())

    def test_stock_diffusers_loads_our_adapter(self, family: str, models: dict[str, Path], tmp_path: Path) -> None:
        policy = trained(models[family])
        policy.save(tmp_path / "run", {"method": "inpo"})
        pipeline = tiny_pipeline(family)
        base = stock_sample(pipeline, NOISE)
        pipeline.load_lora_weights(tmp_path / "run")
        stock, ours = stock_sample(pipeline, NOISE), our_sample(policy, NOISE)
        torch.testing.assert_close(ours, stock, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(stock, base, rtol=1e-2, atol=1e-2)

    def test_run_folder_loads_with_its_base(self, family: str, models: dict[str, Path], tmp_path: Path) -> None:
        policy = trained(models[family])
        policy.save(tmp_path, {"method": "inpo"})
        again = load_policy(tmp_path)
        assert again.adapters.names == ("start",)
        assert again.adapters.active == "start"
        assert not any(p.requires_grad for p in again.module.parameters())
        assert again.adapters.fingerprint("start") == policy.adapters.fingerprint("default")
        assert torch.equal(our_sample(again, NOISE), our_sample(policy, NOISE))

    def test_adapters_saved_by_stock_diffusers_load(self, family: str, models: dict[str, Path], tmp_path: Path) -> None:
        policy = trained(models[family])
        pipeline = tiny_pipeline(family)
        type(pipeline).save_lora_weights(
            tmp_path, **{f"{policy.denoiser}_lora_layers": dict(policy.adapters.state_dict())}
        )
        other = load_policy(models[family])
        load_adapter(other, tmp_path, "mine", trainable=True)
        assert other.adapters.settings("mine").rank == other.adapters.settings("mine").scale_numerator == 3
        mine = other.adapters.parameters("mine")
        assert len(mine) == len(policy.adapters.parameters())
        assert all(p.requires_grad for p in mine)
        pipeline.load_lora_weights(tmp_path)
        torch.testing.assert_close(our_sample(other, NOISE), stock_sample(pipeline, NOISE), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("scaled", [{"lora_alpha": 8}, {"use_rslora": True}])
    def test_adapters_of_other_scales_mean_what_they_mean_in_stock_diffusers(
        self, family: str, scaled: dict[str, Any], models: dict[str, Path], tmp_path: Path
    ) -> None:
        pipeline, name = tiny_pipeline(family), trained(models[family]).denoiser
        network = getattr(pipeline, name)
        settings = {"r": 4, "lora_alpha": 4, "target_modules": ["to_q", "to_v"], "init_lora_weights": False}
        network.add_adapter(LoraConfig(**{**settings, **scaled}))
        type(pipeline).save_lora_weights(
            tmp_path,
            **{f"{name}_lora_layers": get_peft_model_state_dict(network)},
            **_collate_lora_metadata({name: network}),
        )
        policy = load_policy(models[family])
        load_adapter(policy, tmp_path, "theirs")
        torch.testing.assert_close(our_sample(policy, NOISE), stock_sample(pipeline, NOISE), rtol=1e-4, atol=1e-4)

    def test_full_fine_tuning_saves_a_pipeline(self, family: str, models: dict[str, Path], tmp_path: Path) -> None:
        policy = load_policy(models[family])
        policy.train_weights()
        with torch.no_grad():
            for parameter in policy.module.parameters():
                parameter *= 1.01
        expected = our_sample(policy, NOISE)
        policy.save(tmp_path, {"method": "sft"})
        assert not (tmp_path / ".draft.tmp").exists()
        assert json.loads((tmp_path / "diffalign.json").read_text())["method"] == "sft"
        assert torch.equal(our_sample(load_policy(tmp_path), NOISE), expected)
        absent = {"text_encoder_3": None, "tokenizer_3": None} if family == "sd3" else {}
        stock = type(tiny_pipeline(family)).from_pretrained(tmp_path, **absent)
        stock.set_progress_bar_config(disable=True)
        torch.testing.assert_close(stock_sample(stock, NOISE), expected, rtol=1e-4, atol=1e-4)


class TestOptions:
    def test_half_precision_keeps_fragile_vaes_in_float32(self, models: dict[str, Path], tmp_path: Path) -> None:
        policy = load_policy(models["sdxl"], dtype=torch.float16)
        types = {type(part).__name__: next(part.parameters()).dtype for part in policy.parts}
        assert types["AutoencoderKL"] == torch.float32
        assert {types["UNet2DConditionModel"], types["CLIPTextModel"]} == {torch.float16}
        pipeline = tiny_pipeline("sdxl")
        pipeline.vae.register_to_config(force_upcast=False)
        pipeline.save_pretrained(tmp_path)
        parts = load_policy(tmp_path, dtype=torch.float16).parts
        assert {next(part.parameters()).dtype for part in parts} == {torch.float16}

    def test_denoiser_may_have_a_type_of_its_own(self, models: dict[str, Path], tmp_path: Path) -> None:
        policy = load_policy(models["sdxl"], dtype=torch.bfloat16, denoiser_dtype=torch.float32)
        assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
        assert {p.dtype for part in policy.companions for p in part.parameters()} == {torch.bfloat16}
        policy.train_weights()
        policy.save(tmp_path, {})  # what was rounded for the run is exported as it was
        whole, again = load_policy(models["sdxl"]), load_policy(tmp_path)
        for before, after in zip(whole.parts, again.parts, strict=True):
            for ours, stock in zip(after.parameters(), before.parameters(), strict=True):
                assert torch.equal(ours, stock)

    def test_full_fine_tuning_trains_float32(self, models: dict[str, Path]) -> None:
        policy = load_policy(models["sd"], dtype=torch.bfloat16)
        policy.train_weights()
        assert {p.dtype for p in policy.module.parameters()} == {torch.float32}
        with pytest.raises(UserError, match="choose one"):
            trained(models["sd"]).train_weights()

    def test_sd3_without_its_third_text_encoder(self, models: dict[str, Path], tmp_path: Path) -> None:
        whole = save_tiny("sd3", tmp_path / "model", t5=True)
        policy, usual = load_policy(whole, drop_text_encoder_3=True), load_policy(models["sd3"])
        assert len(load_policy(whole).parts) == len(policy.parts) + 1
        assert torch.equal(our_sample(policy, NOISE), our_sample(usual, NOISE))
        policy.adapters.add("default", LoraSettings(rank=3))
        policy.save(tmp_path / "run", {})
        assert len(load_policy(tmp_path / "run").parts) == len(policy.parts)
        with pytest.raises(UserError, match="no third text encoder"):
            load_policy(models["sd"], drop_text_encoder_3=True)

    def test_checkpointing(self, models: dict[str, Path]) -> None:
        policy = load_policy(models["sd"], gradient_checkpointing=True)
        assert policy.module.is_gradient_checkpointing
        assert load_policy(models["sd"]).module.is_gradient_checkpointing is False


class TestFiles:
    def test_header_says_what_it_is(self, models: dict[str, Path], tmp_path: Path) -> None:
        trained(models["sd"]).save(tmp_path, {"method": "inpo"})
        with safe_open(tmp_path / LORA_FILE, "pt") as file:
            header = file.metadata()
        assert header["method"] == "inpo"
        assert header["base_model"] == str(models["sd"])
        assert (header["rank"], header["alpha"]) == ("3", "6")
        assert [path.name for path in tmp_path.iterdir()] == [LORA_FILE]

    def test_nothing_half_written(
        self, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = trained(models["sd"])

        def full(tensors: object, path: Path, metadata: object) -> None:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("diffalign.policies.saving.save_file", full)
        with pytest.raises(UserError, match="No space left"):
            policy.save(tmp_path, {})
        assert list(tmp_path.iterdir()) == []

    def test_pipeline_nothing_half_written(
        self, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        policy = load_policy(models["sd"])

        def full(*args: object, **kwargs: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(type(policy.module), "save_pretrained", full)
        with pytest.raises(UserError, match="No space left"):
            policy.save(tmp_path, {})
        assert list(tmp_path.iterdir()) == []

    def test_foreign_and_mixed_files_are_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "x.safetensors"
        save_file({"lora_unet_a.lora_down.weight": torch.zeros(2, 2)}, path)
        with pytest.raises(UserError, match="save_lora_weights"):
            read_lora(path, "unet")
        names = ("unet.a.lora_A.weight", "unet.b.lora_A.weight")
        save_file({name: torch.zeros(rank + 1, 2) for rank, name in enumerate(names)}, path)
        with pytest.raises(UserError, match="mixes adapters of ranks"):
            read_lora(path, "unet")
        path.write_bytes(path.read_bytes()[:20])
        with pytest.raises(UserError, match="no whole safetensors file"):
            read_lora(path, "unet")
        with pytest.raises(UserError, match="no adapter in"):
            read_lora(tmp_path, "unet")

    def test_adapter_of_another_model_is_refused(self, models: dict[str, Path], tmp_path: Path) -> None:
        trained(models["sd3"]).save(tmp_path / "sd3", {})
        with pytest.raises(UserError, match="no adapter of the unet"):
            load_adapter(load_policy(models["sd"]), tmp_path / "sd3", "x")
        trained(models["sd"]).save(tmp_path / "sd", {})
        with pytest.raises(UserError, match="do not fit"):
            load_adapter(load_policy(models["sdxl"]), tmp_path / "sd", "x")

    def test_the_trained_adapter_is_saved(self, models: dict[str, Path], tmp_path: Path) -> None:
        policy = trained(models["sd"], "start")
        policy.adapters.copy("start", "default")
        with torch.no_grad():
            for parameter in policy.adapters.parameters("default"):
                parameter += 1
        policy.save(tmp_path, {})
        saved = load_file(tmp_path / LORA_FILE)
        for key, value in policy.adapters.state_dict("default").items():
            assert torch.equal(saved[f"unet.{key}"], value)


class TestNames:
    def test_local_hub_and_bundled_names(
        self, models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert resolve(models["sd"]).model == str(models["sd"])
        assert resolve("org/model", "main", "fp16").revision == "main"
        assert resolve("org/model").model == "org/model"
        monkeypatch.setattr("diffalign.policies.loading.is_bundled", lambda name: name == "tiny")
        monkeypatch.setattr("diffalign.policies.loading.bundled_path", lambda name: tmp_path / name)
        save_tiny("sd", tmp_path / "tiny")
        assert resolve("tiny").model == str(tmp_path / "tiny")

    def test_run_folder_of_a_run_folder(self, models: dict[str, Path], tmp_path: Path) -> None:
        policy = trained(models["sd"])
        save_lora(tmp_path, policy.adapters, "default", "unet", {"base_model": str(models["sd"])})
        assert resolve(tmp_path) == resolve(tmp_path / LORA_FILE)
        assert resolve(tmp_path).adapter == tmp_path / LORA_FILE

    def test_adapter_without_a_base_is_refused(self, models: dict[str, Path], tmp_path: Path) -> None:
        save_lora(tmp_path, trained(models["sd"]).adapters, "default", "unet", {})
        with pytest.raises(UserError, match="does not say which model"):
            load_policy(tmp_path)

    @pytest.mark.parametrize("name", ["./nowhere", "no-such-model", "/a/b/c"])
    def test_missing_paths(self, name: str) -> None:
        with pytest.raises(UserError):
            load_policy(name)

    def test_folder_without_a_model(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"expected model_index\.json"):
            load_policy(tmp_path)

    @pytest.mark.parametrize("kind", ["FluxPipeline", "PixArtAlphaPipeline", "WanPipeline"])
    def test_unknown_pipeline_names_the_known(self, kind: str, tmp_path: Path) -> None:
        (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": kind}))
        known = "StableDiffusionPipeline, StableDiffusionXLPipeline, StableDiffusion3Pipeline"
        with pytest.raises(UserError, match=f"is a {kind}, which is not supported; supported are {known}"):
            load_policy(tmp_path)
        assert sorted(FAMILIES) == ["StableDiffusion3Pipeline", "StableDiffusionPipeline", "StableDiffusionXLPipeline"]

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("tiny-pickscore", r"tiny-pickscore is a reward \(CLIPModel\) and draws no images: give it to --rewards"),
            ("preferences", "preferences is a data set: give it to --dataset_name"),
            ("tiny-writer", "of transformers: language models are trained by diffalign train-text"),
            ("tiny-ds", "unknown model 'tiny-ds': did you mean 'tiny-sd'"),
            ("pickscore", "unknown model 'pickscore': known: tiny-sd, tiny-sd-turbo, tiny-sd3"),
            ("absent.safetensors", r"there is no file absent\.safetensors"),
        ],
    )
    def test_what_is_no_pipeline_is_called_what_it_is(self, name: str, message: str) -> None:
        with pytest.raises(UserError, match=message):
            load_policy(name)

    @pytest.mark.parametrize(
        ("weight", "kind"),
        [
            ("model.diffusion_model.input_blocks.0.0.weight", "StableDiffusionPipeline"),
            ("conditioner.embedders.1.model.ln_final.weight", "StableDiffusionXLPipeline"),
            ("model.diffusion_model.joint_blocks.0.x_block.attn.proj.weight", "StableDiffusion3Pipeline"),
        ],
    )
    def test_a_checkpoint_in_a_single_file_is_told_how_to_become_a_folder(
        self, weight: str, kind: str, tmp_path: Path
    ) -> None:
        import diffusers

        path = tmp_path / "model.safetensors"
        save_file({weight: torch.zeros(1), "first_stage_model.decoder.conv_in.weight": torch.zeros(1)}, path)
        for name in (path, tmp_path):  # its folder too
            with pytest.raises(UserError, match=rf"model\.safetensors is a checkpoint in a single file: .*{kind} as P"):
                load_policy(name)
        assert callable(getattr(diffusers, kind).from_single_file)

    def test_other_files_of_weights(self, models: dict[str, Path], tmp_path: Path) -> None:
        (tmp_path / "model.ckpt").write_bytes(b"a pickle, not opened")
        with pytest.raises(UserError, match=r"model\.ckpt is a checkpoint in a single file: .*StableDiffusionPipeline"):
            load_policy(tmp_path / "model.ckpt")
        with pytest.raises(
            UserError, match=r"unet is one part of a pipeline \(UNet2DConditionModel\): name the folder"
        ):
            load_policy(models["sd"] / "unet")
        with pytest.raises(UserError, match="is no model: expected the folder of a diffusers pipeline"):
            load_policy(models["sd"] / "unet" / "diffusion_pytorch_model.safetensors")

    def test_damaged_model(self, models: dict[str, Path], tmp_path: Path) -> None:
        index = json.loads((models["sd"] / "model_index.json").read_text())
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        with pytest.raises(UserError, match="cannot load"):
            load_policy(tmp_path)

    def test_hub_name_without_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(UserError, match=r"the hub cannot be reached; .*first run: hf download nobody") as told:
            load_policy("nobody/nothing")
        assert len(str(told.value).splitlines()) == 1

    def test_pickles_only_when_asked(self, tmp_path: Path) -> None:
        tiny_pipeline("sd").save_pretrained(tmp_path, safe_serialization=False)
        with pytest.raises(UserError, match="cannot load"):
            load_policy(tmp_path)
        assert load_policy(tmp_path, allow_pickle=True).fingerprint() == tiny_policy("sd").fingerprint()
