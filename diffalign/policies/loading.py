"""From a name or a path to a policy: bundled models, local folders, the hub, and folders of trained adapters."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from diffalign.bundled import bundled_names, bundled_path, is_bundled
from diffalign.errors import UserError, unknown
from diffalign.policies.adapters import START_ADAPTER
from diffalign.policies.attention import AttentionBackend, require_attention_backend, set_attention_backend
from diffalign.policies.components import LEFT_OUT, PipelinePolicy
from diffalign.policies.recognise import CHECKPOINT_SUFFIXES, is_lora, not_a_pipeline
from diffalign.policies.saving import lora_path, read_lora, read_lora_metadata
from diffalign.policies.sd3 import SD3Policy
from diffalign.policies.unet import SDXLPolicy, UNetPolicy

INDEX_FILE = "model_index.json"
"""What makes a folder a pipeline of diffusers."""
FAMILIES: dict[str, type[PipelinePolicy]] = {
    name: family for family in (UNetPolicy, SDXLPolicy, SD3Policy) for name in family.pipelines
}
"""Class name of a pipeline, as ``model_index.json`` has it -> policy."""


@dataclass(frozen=True)
class Source:
    """Where a model comes from.

    Args:
        model: local folder or hub name of the pipeline.
        adapter: folder or file of an adapter on it.
        revision, variant: of the pipeline's files.
        drop_text_encoder_3: the pipeline is loaded without its third text encoder.
    """

    model: str
    adapter: Path | None = None
    revision: str | None = None
    variant: str | None = None
    drop_text_encoder_3: bool = False


def load_policy(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    denoiser_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    variant: str | None = None,
    drop_text_encoder_3: bool = False,
    attention_backend: AttentionBackend = "sdpa",
    gradient_checkpointing: bool = False,
    allow_pickle: bool = False,
) -> PipelinePolicy:
    """Load a text-to-image model as a policy; all its weights are frozen.

    Args:
        name_or_path: bundled name ("tiny-sd"), local folder in diffusers format, hub name (no network is needed once
            cached), or a run folder or LoRA file: then the model it was trained on, with that adapter, frozen and
            active, under the name ``START_ADAPTER``.
        dtype: type of the weights. In float16 a VAE that overflows there stays float32.
        denoiser_dtype: type of the denoiser's weights where it is another: float32 for those that will train.
        device: where the weights go.
        revision, variant: of the files, on the hub or in the folder.
        drop_text_encoder_3: leave out the third text encoder (T5) of Stable Diffusion 3; an adapter trained without it
            is loaded without it anyway.
        attention_backend: attention kernels by name.
        gradient_checkpointing: recompute activations of the denoiser in backward.
        allow_pickle: also load weights that are not safetensors.

    Raises:
        UserError: for a path that does not exist, a model of an unknown family, damaged files, no third text encoder.
    """
    require_attention_backend(attention_backend)  # before weights are read
    source = resolve(name_or_path, revision, variant, drop_text_encoder_3)
    policy = _load_pipeline(source, dtype, denoiser_dtype or dtype, allow_pickle)
    for part in policy.parts:
        part.to(device)
    if source.adapter is not None:
        load_adapter(policy, source.adapter, START_ADAPTER)
    set_attention_backend(policy.module, attention_backend)
    if gradient_checkpointing:
        policy.enable_gradient_checkpointing()
    return policy


def load_adapter(policy: PipelinePolicy, path: str | Path, name: str, trainable: bool = False) -> None:
    """Add an adapter read from a run folder or a LoRA file.

    Raises:
        UserError: if there is none, or it does not fit the model.
    """
    weights = read_lora(path, policy.denoiser)
    policy.adapters.add(name, weights.settings, trainable)
    policy.adapters.load_state_dict(name, weights.state)


def resolve(
    name_or_path: str | Path,
    revision: str | None = None,
    variant: str | None = None,
    drop_text_encoder_3: bool = False,
) -> Source:
    """Find out what a name means: see :func:`load_policy`.

    Raises:
        UserError: for a path that does not exist or holds no model.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if (path / INDEX_FILE).is_file():
        return Source(str(path), None, revision, variant, drop_text_encoder_3)
    adapter = lora_path(path)
    if adapter is not None and is_lora(adapter):
        metadata = read_lora_metadata(adapter)
        base = metadata.get("base_model")
        if not base:
            raise UserError(f"{adapter} does not say which model it was trained on: name that model, and this adapter")
        drop = drop_text_encoder_3 or "text_encoder_3" in metadata.get(LEFT_OUT, "")
        inner = resolve(base, revision or metadata.get("base_revision"), variant or metadata.get("base_variant"), drop)
        return replace(inner, adapter=adapter)
    if path.exists():
        raise not_a_pipeline(name, path)
    if is_bundled(name):
        if not (bundled_path(name) / INDEX_FILE).is_file():
            raise not_a_pipeline(name, bundled_path(name))
        return Source(str(bundled_path(name)), None, revision, variant, drop_text_encoder_3)
    if path.suffix in CHECKPOINT_SUFFIXES:
        raise UserError(f"there is no file {name}")
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return Source(name, None, revision, variant, drop_text_encoder_3)
    if "/" not in name:
        models = [other for other in bundled_names() if (bundled_path(other) / INDEX_FILE).is_file()]
        raise unknown("model", name, models)
    raise UserError(f"there is no folder {name}")


def pipeline_index(source: Source) -> dict[str, Any]:
    """Read a pipeline's ``model_index.json``: its class under "_class_name", and its parts.

    Raises:
        UserError: if it cannot be read, as offline without a cached copy.
    """
    from diffusers import DiffusionPipeline
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        with _quiet():
            index = DiffusionPipeline.load_config(source.model, revision=source.revision)
        return {"_class_name": "nameless pipeline", **index}
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        if Path(source.model).is_dir():
            raise UserError(f"cannot read {INDEX_FILE} of {source.model}: {reason}") from error
        # diffusers calls a file absent, too, that it could not ask for
        unreached = isinstance(error.__cause__ or error.__context__, LocalEntryNotFoundError)
        raise UserError(
            f"cannot get {source.model}: there is no such folder, it is not in the hub's cache here, and the hub "
            f"{'cannot be reached' if unreached else f'does not give it ({reason})'}; where there is a network, first "
            f"run: hf download {source.model} (after hf auth login if it is gated); or name a folder, or a bundled "
            "model such as tiny-sd"
        ) from error


def _load_pipeline(
    source: Source, dtype: torch.dtype, denoiser_dtype: torch.dtype, allow_pickle: bool
) -> PipelinePolicy:
    import diffusers

    index = pipeline_index(source)
    class_name = index["_class_name"]
    if class_name not in FAMILIES:
        raise UserError(
            f"{source.model} is a {class_name}, which is not supported; supported are {', '.join(FAMILIES)}"
        )
    family = FAMILIES[class_name]
    types = {"default": dtype, "vae": torch.float32 if dtype is torch.float16 else dtype}
    types[family.denoiser] = denoiser_dtype
    absent = {part: None for part, value in index.items() if value == [None, None]}  # SD3 without T5, for one
    if source.drop_text_encoder_3:
        if "text_encoder_3" not in index:
            raise UserError(f"{source.model} is a {class_name}, which has no third text encoder to leave out")
        absent |= dict.fromkeys(("text_encoder_3", "tokenizer_3"))
    arguments = {
        "pretrained_model_name_or_path": source.model,
        "torch_dtype": types,
        "use_safetensors": None if allow_pickle else True,
        **({"revision": source.revision} if source.revision else {}),
        **({"variant": source.variant} if source.variant else {}),
        **absent,
        **family.load_options,
    }
    try:
        with _quiet():
            pipeline = getattr(diffusers, class_name).from_pretrained(**arguments)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {source.model}: {error}") from error
    if dtype is torch.float16 and not pipeline.vae.config.get("force_upcast", True):
        pipeline.vae.to(dtype)
    return family(pipeline, arguments)


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide the libraries' progress bars, advice and deprecations while a model loads; all come back."""
    from diffusers.utils import logging as diffusers_logging
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging as transformers_logging

    libraries: tuple[Any, ...] = (diffusers_logging, transformers_logging)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    hub = hub_logging.get_verbosity()
    hub_logging.set_verbosity_error()  # it tells of every attempt to reach the hub, also where the cache then serves
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # diffusers renames torch_dtype; old versions know no other
            warnings.filterwarnings("ignore", "The `local_dir_use_symlinks`")
            yield
    finally:
        hub_logging.set_verbosity(hub)
        for library, (verbosity, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(verbosity)
            if bars:
                library.enable_progress_bar()
