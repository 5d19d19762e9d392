"""From a name or a path to a language model: bundled, local, on the hub, or a folder of a trained adapter."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.bundled import bundled_path, is_bundled
from diffalign.errors import UserError
from diffalign.policies.adapters import START_ADAPTER
from diffalign.text.policy import TextPolicy
from diffalign.text.saving import ADAPTER_CONFIG, read_peft_adapter


@dataclass(frozen=True)
class TextSource:
    """Where a language model comes from.

    Args:
        name: as the user would give it again.
        model: local folder or hub name.
        adapter: folder of an adapter on it.
    """

    name: str
    model: str
    adapter: Path | None = None


def load_text_policy(
    name_or_path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    revision: str | None = None,
    gradient_checkpointing: bool = False,
    allow_pickle: bool = False,
) -> TextPolicy:
    """Load a causal language model as a policy; all its weights are frozen, and its dropout is off, as in all recipes.

    Args:
        name_or_path: bundled name ("tiny-writer"), local folder, hub name (no network is needed once cached), or a run
            folder: then the model it was trained on, with that adapter, frozen and active, as ``START_ADAPTER``.
        dtype: type of the weights.
        device: where they go.
        revision: on the hub.
        gradient_checkpointing: recompute activations in backward.
        allow_pickle: also load weights that are not safetensors.

    Raises:
        UserError: for a path that does not exist, a model of another kind, damaged files.
    """
    source = resolve_text(name_or_path)
    module, tokenizer = _load(source.model, dtype, revision, allow_pickle)
    described = {"base_model": source.name} | ({"base_revision": revision} if revision else {})
    policy = TextPolicy(module.to(device), tokenizer, described)
    if gradient_checkpointing:
        module.gradient_checkpointing_enable({"use_reentrant": False})
    if source.adapter is not None:
        load_text_adapter(policy, source.adapter, START_ADAPTER)
    return policy


def load_text_adapter(policy: TextPolicy, folder: Path, name: str, trainable: bool = False) -> None:
    """Add an adapter read from a folder in peft's format.

    Raises:
        UserError: if there is none, or it does not fit the model.
    """
    adapter = read_peft_adapter(folder)
    policy.adapters.add(name, adapter.settings, trainable)
    policy.adapters.load_state_dict(name, adapter.state)


def resolve_text(name_or_path: str | Path) -> TextSource:
    """Find out what a name means: see :func:`load_text_policy`.

    Raises:
        UserError: for a path that does not exist or holds no language model.
    """
    name = str(name_or_path)
    path = Path(name).expanduser()
    if (path / ADAPTER_CONFIG).is_file():
        base = read_peft_adapter(path).base_model
        if not base:
            raise UserError(f"{path / ADAPTER_CONFIG} does not say which model it was trained on (its field "
                            "base_model_name_or_path is empty): fill it in")  # fmt: skip
        inner = resolve_text(base)
        return TextSource(inner.name, inner.model, path)
    if (path / "config.json").is_file():
        return TextSource(str(path), str(path))
    if path.exists():
        raise UserError(
            f"{name} is no language model: expected config.json (a transformers model) or {ADAPTER_CONFIG} (an adapter)"
        )
    if is_bundled(name):
        return TextSource(name, str(bundled_path(name)))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        return TextSource(name, name)
    if "/" not in name:
        bundled_path(name)  # its error offers the names that exist
    raise UserError(f"there is no folder {name}")


def _load(model: str, dtype: torch.dtype, revision: str | None, allow_pickle: bool) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    try:
        config = AutoConfig.from_pretrained(model, revision=revision)
        for key, value in config.to_dict().items():
            if ("dropout" in key or key.endswith("pdrop")) and isinstance(value, float):
                setattr(config, key, 0.0)
        module = AutoModelForCausalLM.from_pretrained(
            model, config=config, dtype=dtype, revision=revision, use_safetensors=None if allow_pickle else True
        )
        return module, AutoTokenizer.from_pretrained(model, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"cannot load the language model {model}: {error}") from error
