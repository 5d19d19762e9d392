"""What sampled images depend on besides their seeds and the options of the rollout: the model as it samples.

Labels that people gave belong to images that are not kept in a run but sampled again. A run with another model, size or
precision would sample other images and learn the labels of the first ones, without any error.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from diffalign.errors import UserError
from diffalign.policies.adapters import START_ADAPTER
from diffalign.policies.base import Policy
from diffalign.strategies.base import Context


@dataclass(frozen=True)
class Provenance:
    """Where images come from.

    Args:
        size: (height, width) in pixels.
        precision: type that products are computed in, and that of the denoiser's weights where it is another.
        adapter: fingerprint of the adapter that samples; None for the bare model.
        model: fingerprint of the denoiser's own weights.
        encoders: identity of the text encoders and the VAE.
    """

    size: tuple[int, int]
    precision: str
    adapter: str | None
    model: str
    encoders: str

    @classmethod
    def of(
        cls, policy: Policy, adapter: str | None, size: tuple[int, int], autocast: torch.dtype | None = None
    ) -> Provenance:
        """Return where images come from that a policy samples.

        Args:
            policy: samples.
            adapter: name of the adapter that it samples with.
            size: (height, width) in pixels.
            autocast: type of products under mixed precision; None without.
        """
        computed, held = (str(dtype).removeprefix("torch.") for dtype in (autocast or policy.dtype, policy.dtype))
        return cls(
            size=size,
            precision=computed if computed == held else f"{computed} over {held} weights",
            adapter=policy.adapters.fingerprint(adapter) if adapter is not None else None,
            model=policy.fingerprint(),
            encoders=policy.encoder_id,
        )

    @classmethod
    def of_start(cls, ctx: Context) -> Provenance:
        """Return where images come from that the start of a run samples; before its first step."""
        policy = ctx.policy
        adapter = START_ADAPTER if START_ADAPTER in policy.adapters.names else None
        return cls.of(policy, adapter, ctx.resolution or policy.default_resolution, ctx.autocast)

    @classmethod
    def recorded(cls, origin: Mapping[str, Any]) -> Provenance | None:
        """Read what :meth:`record` gave; None from files that were made before anything was recorded."""
        if "model" not in origin:
            return None
        height, width = origin["size"]
        return cls((height, width), origin["precision"], origin["adapter"], origin["model"], origin["encoders"])

    def record(self) -> dict[str, Any]:
        """Return what goes into a file beside the images."""
        return {**asdict(self), "size": list(self.size)}

    def require_same(self, other: Provenance, name: str) -> None:
        """Refuse images of a row that come from elsewhere.

        Args:
            other: where the row's images come from; this is where the run's would.
            name: of the row.

        Raises:
            UserError: saying what differs, and which option to set.
        """
        for difference in (self._size(other), self._precision(other), self._adapter(other), self._model(other)):
            if difference:
                raise UserError(f"the labels of row {name!r} belong to images sampled {difference}")

    def _size(self, other: Provenance) -> str:
        if self.size == other.size:
            return ""
        there, here = (f"{height}x{width}" for height, width in (other.size, self.size))
        height, width = other.size
        remedy = f"set --resolution {height}" if height == width else "leave --resolution out"
        return f"at {there} pixels (height x width), this run samples at {here}: {remedy}"

    def _precision(self, other: Provenance) -> str:
        if self.precision == other.precision:
            return ""
        return (
            f"in {other.precision}, this run samples in {self.precision}: set --mixed_precision and --train_mode to "
            "what they were sampled with"
        )

    def _adapter(self, other: Provenance) -> str:
        if self.adapter == other.adapter:
            return ""
        if other.adapter is None:
            return "without an adapter, this run starts from one: leave --start_adapter out"
        here = "without one" if self.adapter is None else "from another"
        return f"with an adapter ({other.adapter}), this run starts {here}: name theirs with --start_adapter"

    def _model(self, other: Provenance) -> str:
        options = "--pretrained_model_name_or_path, --revision and --variant"
        if self.model != other.model:
            return f"by another model than this run starts from: set {options} to what they were sampled with"
        if self.encoders != other.encoders:
            return (
                f"with other text encoders, or another VAE, than this run has: set {options}, and "
                "--drop_text_encoder_3, to what they were sampled with"
            )
        return ""
