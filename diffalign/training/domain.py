"""What differs between images and text outside the strategies: loading models, reading data, looking at results."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

import torch
from rich.console import Console

from diffalign.errors import UserError
from diffalign.policies.base import BasePolicy
from diffalign.rewards.compose import RewardSpec
from diffalign.strategies.base import DataKind
from diffalign.training.config import ModelOptions, RewardOptions, TrainConfig
from diffalign.training.observing import Observer
from diffalign.training.processes import Processes
from diffalign.training.source import Encode

_DOMAINS = {
    "image": "diffalign.training.image_domain:ImageDomain",
    "text": "diffalign.text.domain:TextDomain",
}
"""Modality of a strategy's spec -> where its domain is."""

EVALUATION_SPLIT: Literal["tune"] = "tune"
"""Split of the bundled world's captions that runs are measured on. Runs are compared with each other while settings are
chosen, so they never look at the test captions."""
EVALUATION_SEED = 0


@dataclass(frozen=True)
class LoadedData:
    """Examples and what turns them into batches.

    Args:
        examples: a sequence of examples, or an object with ``open()`` (a stream): what ``ExampleLoader`` takes.
        encode: turns a micro-batch of examples into a batch.
        prepare: work that a background thread may do ahead, or None.
        rows_per_example: rows that an example puts through the network.
        notes: lines about what was left out, for the run's header.
        left_out: of a stream: reason -> number of examples that this process could not use so far. What all processes
            see is counted by the main one.
    """

    examples: Any
    encode: Encode
    prepare: Callable[[Any], Any] | None = None
    rows_per_example: int = 1
    notes: tuple[str, ...] = ()
    left_out: Callable[[], Mapping[str, int]] | None = None


class Domain(ABC):
    """A modality: one subclass each, without any knowledge of methods."""

    library = "diffusers"
    """Which library loads what a run exports; model cards say so."""

    @abstractmethod
    def load_policy(self, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> BasePolicy:
        """Load the model that the options name, with its start adapter, frozen.

        Args:
            options: which model; weights that will train are float32.
            dtype: type of the weights that stay frozen.
            device: where all go.
        """

    def completed(self, config: TrainConfig, policy: Any) -> TrainConfig:
        """Return the run with what it leaves to the model, and tell the model what the run makes of it."""
        return config

    def weights_header(self, config: TrainConfig, policy: Any) -> Mapping[str, str]:
        """Return what the header of exported weights says of the run besides its method."""
        return {}

    def load_rewards(
        self, specs: Sequence[RewardSpec], options: RewardOptions, device: torch.device, given: Mapping[str, Any]
    ) -> Mapping[str, Any]:
        """Load rewards.

        Args:
            specs: which.
            options: where and how their networks run.
            device: of the model.
            given: those that are Python objects, by label.

        Returns:
            label -> reward.

        Raises:
            UserError: for an unknown reward, or where the modality has none by name.
        """
        raise UserError("--rewards judges images; models of this kind have no rewards by name")

    @abstractmethod
    def read_data(self, source: Any, kind: DataKind, config: TrainConfig) -> Any:
        """Read a data set as examples of a kind; no model is needed.

        Args:
            source: what the user named or gave.
            kind: what the method needs.
            config: the run.

        Returns:
            an object with ``examples``, or with ``open()`` (a stream).

        Raises:
            UserError: for data that cannot be read as that kind.
        """

    @abstractmethod
    def prepare_data(
        self, dataset: Any, config: TrainConfig, policy: Any, processes: Processes, console: Console | None = None
    ) -> LoadedData:
        """Prepare the encoding of a data set; what can be encoded ahead is encoded here, which may take hours.

        Args:
            dataset: as it was read.
            config: the run.
            policy: encodes.
            processes: share out what is encoded ahead; all call this together.
            console: where to show how far that is, on the main process.
        """

    @abstractmethod
    def activation_bytes(self, policy: Any, config: TrainConfig) -> int:
        """Bytes that one row saves for backward."""

    @abstractmethod
    def observer(
        self,
        policy: Any,
        dataset: Any,
        config: TrainConfig,
        judges: Mapping[str, Any],
        processes: Processes,
        console: Any,
    ) -> Observer | None:
        """Return what looks at the model before, during and after the run; None where there is nothing to look at.

        All processes call this, and all or none have an observer; rewards are the main one's.

        Args:
            policy: the model.
            dataset: as it was read.
            config: the run.
            judges: rewards that are loaded already, by label: the one that early stopping watches.
            processes: share out what is sampled.
            console: where results go.
        """


def domain_of(modality: str) -> Domain:
    """Return the domain of a modality."""
    module, name = _DOMAINS[modality].split(":")
    return getattr(import_module(module), name)()
