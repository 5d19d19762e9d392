"""The contract between a method and the loop.

A method is a :class:`Strategy`. The loop calls its hooks in this order and owns every backward pass::

    build(ctx)                            once, before anything is prepared for several processes
    collect(ctx, batches) -> updates      an update = micro-batches that end in one optimizer step
      draw(ctx, batch) -> draws           no gradient, once a micro-batch: noise, timesteps, inverted paths
      pieces(ctx, batch, draws)           default one; several where memory or the mathematics asks
      frozen(ctx, batch, draws, piece)    no gradient: values of the reference and of other frozen policies
      terms(ctx, batch, draws, piece)     the only place with a graph: (rows, K), float32
      statistics(terms, reduce)           reduced over ranks BEFORE the loss
      loss(terms, statistics, batch)      pure
    after_step(ctx)                       after each optimizer step
    close()                               once, however the run ends

With several pieces the loop first evaluates ``terms`` without a graph, takes ``c = d loss / d terms``, then runs one
backward of ``sum(c * terms)`` a piece: the memory of one piece, the exact gradient of the whole.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from diffalign.batch import Batch
from diffalign.rewards.combine import WeightedSum

if TYPE_CHECKING:
    from diffalign.references import Reference

DataKind = Literal[
    "pairs",
    "caption_pairs",
    "mismatched_captions",
    "ranked_lists",
    "unpaired",
    "winners",
    "prompts",
]
"""What an example is (``docs/data.md``), in the order above: two images of one caption; two images, each with a caption
of its own; one image with a matching and a mismatched caption; N images with scores; one image, liked or disliked; one
good image; a caption alone."""
Modality = Literal["image", "text"]
Reduce = Callable[[Tensor], Tensor]
"""Sums a tensor over all processes and returns the sum on every one of them."""


@dataclass(frozen=True)
class Spec:
    """What a method asks of data, models and loop.

    Args:
        data: the kind of examples it needs.
        modality: what the policy must be able to do.
        needs_reference: it evaluates ``ctx.reference``.
        moving_reference: the reference, or where it is evaluated, changes during the run even if noise and timesteps
            are pinned, so its values must never be cached.
        needs_reward: ``None``, a black-box reward, or one that images can be differentiated through.
        trains: "policy" (adapters or weights of the policy) or "own" (what :meth:`Strategy.parameters` returns).
        statistics: scope over which :meth:`Strategy.statistics` is taken: never, one micro-batch, or the whole update.
        lockstep: which hooks take the same passes through the networks, in number and order, for any micro-batch of the
            same size: all of them, all but ``draw``, or none (all methods that sample). Processes that share a network
            in shards must stay in step: for ``draw`` they hold it whole, and methods that promise none are refused.
        replays: steps that were sampled are evaluated again and the densities compared, so that the network must be the
            same both times, without dropout.
        piece_dim: dimension along which the terms of several pieces are joined (0 rows, 1 columns).
        frozen_policies: names of further frozen policies the run must provide.
        waived_guards: guard name -> why it does not apply ("zero_gradient", ...).
        bundled_model: the bundled model of the kind that the method was made for, where that is not the modality's
            usual one: a run starts from it when none is named.
    """

    data: DataKind
    modality: Modality = "image"
    needs_reference: bool = True
    moving_reference: bool = False
    needs_reward: Literal["black_box", "differentiable"] | None = None
    trains: Literal["policy", "own"] = "policy"
    statistics: Literal["none", "micro_batch", "update"] = "none"
    lockstep: Literal["all", "all_but_draw", "none"] = "all"
    replays: bool = False
    piece_dim: Literal[0, 1] = 0
    frozen_policies: tuple[str, ...] = ()
    waived_guards: Mapping[str, str] = field(default_factory=dict)
    bundled_model: str | None = None


@dataclass
class Progress:
    """How far a run is: one object, which the loop, the method and copies of the context share.

    Args:
        step: optimizer steps done so far.
        images: images that this process has sampled for training so far.
        show: told (what, done, in all) during work that takes long within a step.
    """

    step: int = 0
    images: int = 0
    show: Callable[[str, int, int], None] = field(default=lambda what, done, total: None)


@dataclass
class Context:
    """Everything a strategy may touch besides its batch.

    Args:
        policy: the model under training, a ``policies.base.Policy`` or its sibling for text, as the modality says.
        reference: gives frozen values; see :mod:`diffalign.references`.
        device: where tensors of the step live.
        seed: the run's seed; per-example seeds in batches derive from it.
        rewards: named rewards of the run (``rewards.base.Reward``); none where the method needs none.
        reward_weights: the factor of each in the run's one reward, their weighted sum.
        skip_failed_rewards: leave images out that a reward fails on, instead of ending the run.
        resolution: (height, width) of the run's images in pixels; None for the model's own.
        folder: the run folder, for files that explain a failure.
        frozen_policies: further frozen policies by name.
        reduce: sum over processes.
        progress: how far the run is.
        total_steps: optimizer steps planned.
        global_batch: examples of one optimizer step over all processes.
        rank, world_size: place among the processes.
        max_rows: largest number of rows in one forward pass with a graph; 0 means no limit.
        autocast: type that products are computed in under the run's mixed precision; None without.
    """

    policy: Any
    reference: Reference | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    seed: int = 0
    rewards: Mapping[str, Any] = field(default_factory=dict)
    reward_weights: Mapping[str, float] = field(default_factory=dict)
    skip_failed_rewards: bool = False
    resolution: tuple[int, int] | None = None
    folder: Path = field(default_factory=Path)
    frozen_policies: Mapping[str, Any] = field(default_factory=dict)
    reduce: Reduce = field(default=lambda value: value)
    progress: Progress = field(default_factory=Progress)
    total_steps: int = 1
    global_batch: int = 1
    rank: int = 0
    world_size: int = 1
    max_rows: int = 0
    autocast: torch.dtype | None = None

    @property
    def step(self) -> int:
        """Optimizer steps done so far."""
        return self.progress.step

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of the latents of one of the run's images, (channels, ...)."""
        return self.policy.latent_shape(*(self.resolution or self.policy.default_resolution))  # type: ignore[no-any-return]

    @property
    def reward(self) -> WeightedSum:
        """The run's one reward: the weighted sum of all."""
        return WeightedSum(self.rewards, {name: self.reward_weights.get(name, 1.0) for name in self.rewards})


@dataclass(frozen=True)
class Piece:
    """A part of a micro-batch whose graph is built and freed on its own.

    Args:
        rows: rows of the draws that this piece covers; None for all.
        columns: index of the piece along ``K`` (a step of a path); None for all.
        adapter: trainable adapter under which the piece runs, forward and backward; None for the default one.
    """

    rows: slice | None = None
    columns: int | None = None
    adapter: str | None = None


@dataclass(frozen=True)
class Terms:
    """What a loss is a function of.

    Args:
        policy: (rows, K) values of the policy (denoising errors, log-probabilities, ...), with a graph while training.
        frozen: values without a graph by name, each (rows, K): "reference", and "mask" where rows differ in length.
    """

    policy: Tensor
    frozen: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def reference(self) -> Tensor:
        """(rows, K) values of the reference."""
        return self.frozen["reference"]

    @property
    def mask(self) -> Tensor | None:
        """(rows, K) 1 where a value counts; None when all do."""
        return self.frozen.get("mask")

    @staticmethod
    def join(parts: Sequence[Terms], dim: int) -> Terms:
        """Join the terms of several pieces along rows (0) or columns (1)."""
        if len(parts) == 1:
            return parts[0]
        frozen = {name: torch.cat([p.frozen[name] for p in parts], dim) for name in parts[0].frozen}
        return Terms(torch.cat([p.policy for p in parts], dim), frozen)


@dataclass(frozen=True)
class LossOutput:
    """A scalar loss, averaged over the examples of the micro-batch, and detached metrics.

    Args:
        loss: scalar.
        metrics: name -> (B,) or scalar, detached; the loop averages them over examples and processes.
    """

    loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Update:
    """Micro-batches that end in one optimizer step.

    Args:
        micro_batches: the batches, in order.
        weight: this process's share of the number by which the loss, summed over all examples and processes, is
            divided; None: the examples in the batches. Larger where examples were dropped and still count.
        restart: the optimizer forgets its moments first, because what is trained was exchanged.
    """

    micro_batches: Sequence[Batch]
    weight: float | None = None
    restart: bool = False


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with their own treatment by the optimizer.

    Args:
        parameters: leaves that require gradients.
        lr_scale: factor on the run's learning rate.
        clip: gradient clipping over all parameters together, for each row (first dimension) alone, or none.
    """

    parameters: Sequence[torch.nn.Parameter]
    lr_scale: float = 1.0
    clip: Literal["global", "per_row", "none"] = "global"


class Kernel(Protocol):
    """How a modality turns a batch into terms; strategies compose one (see ``pair_kernel`` and ``text.kernel``)."""

    def draw(self, ctx: Context, batch: Any) -> Any: ...

    def rows(self, draws: Any) -> int: ...

    def frozen(self, ctx: Context, batch: Any, draws: Any, piece: Piece) -> Mapping[str, Tensor]: ...

    def terms(self, ctx: Context, batch: Any, draws: Any, piece: Piece) -> Tensor: ...


class Strategy(ABC):
    """One published method. Subclass it directly, set :attr:`spec` and :attr:`Config`, and implement :meth:`loss`.

    Example::

        @register("sft", summary="...", paper="...", repository="...")
        class SFT(Strategy):
            spec = Spec(data="winners", needs_reference=False)
            Config = SFTConfig

            def kernel(self) -> Kernel:
                return DenoisingKernel()

            def loss(self, terms, statistics, batch):
                return LossOutput(terms.policy.mean())
    """

    spec: Spec
    Config: ClassVar[type]
    glossary: ClassVar[Mapping[str, str]] = {}
    """What the metrics mean that this method alone reports; those of several methods are in ``strategies.metrics``."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self._kernel = self.kernel()

    def kernel(self) -> Kernel:
        """Return the kernel that the default hooks delegate to; strategies with hooks of their own need none."""
        raise TypeError(f"{type(self).__name__} composes no kernel: it must define draw, frozen and terms itself")

    def check_examples(self, examples: Sequence[Any]) -> None:  # noqa: B027 - an optional hook
        """Refuse examples that lack what the method reads, before anything is loaded or encoded; not for streams.

        Raises:
            UserError: saying what is missing and where.
        """

    def build(self, ctx: Context) -> None:  # noqa: B027 - an optional hook
        """Create adapters, heads, tables: everything that must exist before the model is prepared for training."""

    def parameters(self) -> list[ParameterGroup]:
        """Return what is trained when ``spec.trains == "own"``."""
        return []

    @property
    def updates_per_batch(self) -> int:
        """Updates that :meth:`collect` makes of the batches of one global batch."""
        return 1

    @property
    def rows_per_pass(self) -> int:
        """Rows that a pass with a graph puts through the network; 0 where the batch decides."""
        return 0

    def collect(self, ctx: Context, batches: Sequence[Batch]) -> Iterable[Update]:
        """Turn the loader's batches into updates; offline methods make one update of them."""
        return [Update(batches)]

    def draw(self, ctx: Context, batch: Any) -> Any:
        """Draw noise, timesteps and paths for a micro-batch, once and without gradient."""
        return self._kernel.draw(ctx, batch)

    def pieces(self, ctx: Context, batch: Any, draws: Any) -> list[Piece]:
        """Return the parts whose graphs are built one at a time; by default as few as ``ctx.max_rows`` allows."""
        rows = self._kernel.rows(draws) if ctx.max_rows else 0
        if rows <= ctx.max_rows:
            return [Piece()]
        return [Piece(rows=slice(start, min(start + ctx.max_rows, rows))) for start in range(0, rows, ctx.max_rows)]

    def frozen(self, ctx: Context, batch: Any, draws: Any, piece: Piece) -> Mapping[str, Tensor]:
        """Evaluate the frozen values of a piece, each (rows, K)."""
        if not self.spec.needs_reference:
            return {}
        return self._kernel.frozen(ctx, batch, draws, piece)

    def terms(self, ctx: Context, batch: Any, draws: Any, piece: Piece) -> Tensor:
        """Evaluate the policy's values of a piece, (rows, K), with a graph."""
        return self._kernel.terms(ctx, batch, draws, piece)

    def statistics(self, terms: Terms, reduce: Reduce) -> Mapping[str, Tensor]:
        """Return what the loss needs to know of all examples together; ``terms`` carries no graph."""
        return {}

    @abstractmethod
    def loss(self, terms: Terms, statistics: Mapping[str, Tensor], batch: Any) -> LossOutput:
        """Return the loss of a micro-batch, averaged over its examples. Pure."""

    def after_step(self, ctx: Context) -> None:  # noqa: B027 - an optional hook
        """Called after each optimizer step: refresh a moving reference, record a checkpoint in a pool."""

    def state_dict(self) -> dict[str, Any]:
        """State beyond parameters that a checkpoint must carry (tensors and plain values)."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, yet the checkpoint holds {sorted(state)}")

    def describe(self, ctx: Context) -> tuple[str, ...]:
        """Return lines for the run's header: what the configuration amounts to on this model."""
        return ()

    def advise(self, metrics: Mapping[str, float]) -> str:
        """Return what a logging interval's metrics tell the user, told where it persists; empty for nothing."""
        return ""

    def export(self, ctx: Context, folder: Path) -> None:  # noqa: B027 - an optional hook
        """Write results other than the policy's weights into the run folder."""

    def close(self) -> None:  # noqa: B027 - an optional hook
        """Let go of threads and files when the run ends, however it ends."""
