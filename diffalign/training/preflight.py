"""What is refused before anything expensive: options that contradict, packages that lack, data that will not do."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from diffalign.device import require_device
from diffalign.errors import UserError
from diffalign.rewards.compose import parse_rewards
from diffalign.strategies.base import Spec, Strategy
from diffalign.training.config import SAME_DEVICE, TrainConfig
from diffalign.training.launch import launched_precision
from diffalign.training.optim import require_optimizer
from diffalign.training.trackers import require_trackers


def check_options(spec: Spec, config: TrainConfig) -> None:
    """Refuse contradictions between method and options, and options whose packages are not installed.

    Raises:
        UserError: naming the options.
    """
    _check_launch(config)
    require_trackers(config.run.report_to)
    require_optimizer(config.optim.optimizer)
    _check_method(spec, config)
    _check_reward_options(spec, config)


def check_rewards(rewards: Mapping[str, Any], spec: Spec, config: TrainConfig) -> None:
    """Refuse rewards without gradients where the method needs them.

    Raises:
        UserError: naming the rewards.
    """
    flat = [name for name, reward in rewards.items() if not reward.info.differentiable]
    if spec.needs_reward == "differentiable" and flat:
        raise UserError(f"{config.method!r} differentiates its rewards, but {', '.join(flat)} has no gradient")


def check_data(dataset: Any, rewards: Mapping[str, Any], strategy: Strategy) -> None:
    """Refuse examples that lack what the method or a reward reads; of a stream nothing is known yet.

    Args:
        dataset: as a domain reads it.
        rewards: those that are trained on, by label.
        strategy: the method.

    Raises:
        UserError: naming what is missing.
    """
    if hasattr(dataset, "open"):
        return
    strategy.check_examples(dataset.examples)
    readers = [name for name, reward in rewards.items() if reward.info.needs_metadata]
    if readers and not all(example.metadata for example in dataset.examples):
        raise UserError(
            f"the reward {', '.join(readers)} reads a description of each caption, which these captions lack: give "
            "them a column 'metadata' (GenEval's row format), or choose another reward"
        )


def _check_launch(config: TrainConfig) -> None:
    launched, own = launched_precision(os.environ), config.optim.mixed_precision
    if launched and own != launched:
        raise UserError(
            f"accelerate is configured for --mixed_precision {launched}, but the run's own --mixed_precision is {own}: "
            "say it in one place"
        )


def _check_method(spec: Spec, config: TrainConfig) -> None:
    if spec.moving_reference and config.data.pinned_draws:
        raise UserError(
            f"--pinned_draws caches values of the reference, but the reference of {config.method!r} moves during the "
            "run: leave the option out"
        )
    if spec.data == "prompts" and config.data.pinned_draws:
        raise UserError(
            f"--pinned_draws would make {config.method!r} sample the same images again: leave the option out"
        )
    if spec.trains == "own" and config.optim.use_ema:
        raise UserError(f"--use_ema averages the model's weights, which {config.method!r} does not train: leave it out")
    if spec.replays and config.model.lora_dropout:
        raise UserError(
            f"{config.method!r} samples without dropout and compares densities with those of training, which "
            "--lora_dropout would falsify: leave it out"
        )
    if spec.data != "prompts" and config.data.prompts:
        raise UserError(f"--prompts is for methods that make their own samples; {config.method!r} takes --dataset_name")
    if config.model.train_mode == "full" and config.model.start_adapter:
        raise UserError("--start_adapter needs --train_mode lora: all weights cannot train beside an adapter")


def _check_reward_options(spec: Spec, config: TrainConfig) -> None:
    if spec.needs_reward and not config.reward.rewards:
        raise UserError(f"{config.method!r} learns from a reward: name one or more with --rewards, such as pickscore")
    if not spec.needs_reward and config.reward.rewards:
        raise UserError(f"{config.method!r} uses no reward: leave --rewards out")
    place, watched = config.reward.reward_device, config.run.early_stop_reward
    if place != SAME_DEVICE:
        require_device(place, "--reward_device", SAME_DEVICE)
    if watched and spec.modality == "text":
        raise UserError("--early_stop_reward judges images; text methods have no rewards by name")
    trained = parse_rewards(config.reward.rewards) if config.reward.rewards else []
    if watched in [part.label for part in trained]:
        raise UserError(f"--early_stop_reward {watched} is trained on and cannot tell when to stop: name another")
    running = [part.label for part in trained if part.normalise]
    if spec.needs_reward == "differentiable" and running:
        raise UserError(
            f"{config.method!r} follows the gradient of {', '.join(running)}, which 'normalise' changes with every "
            "image seen: give it a weight instead"
        )
