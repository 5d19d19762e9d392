"""From a configuration to a run that is ready to start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffalign.data.loader import ExampleLoader, LoaderOptions
from diffalign.errors import UserError
from diffalign.policies.adapters import DEFAULT_ADAPTER, START_ADAPTER, LoraSettings
from diffalign.policies.base import BasePolicy
from diffalign.references import CachedReference, Reference, start_full, start_lora
from diffalign.rewards.compose import RewardSpec, parse_rewards
from diffalign.strategies.base import Context, Spec, Strategy
from diffalign.strategies.registry import get_method
from diffalign.training.batch_plan import BatchPlan, plan_batches
from diffalign.training.checkpoint import RunIdentity, refuse_other_run
from diffalign.training.config import TrainConfig
from diffalign.training.domain import Domain, LoadedData, domain_of
from diffalign.training.header import model_line, rate_origin
from diffalign.training.loop import RunRecord, RunResult, Trainer
from diffalign.training.memory import Networks, estimate, refuse_if_too_large
from diffalign.training.observing import Observer
from diffalign.training.optim import scaled_learning_rate
from diffalign.training.preflight import check_data, check_options, check_rewards
from diffalign.training.processes import Processes
from diffalign.training.runfolder import Claim, RunFolder, choose_folder, claim_folder, model_card
from diffalign.training.sharding import networks_of, refuse_unless_shardable, shard
from diffalign.training.source import EncodedSource
from diffalign.training.step import AUTOCAST
from diffalign.training.trackers import Tracker
from diffalign.training.trainables import Trainables

_PREFETCHED = 8
"""Micro-batches whose images are decoded ahead, where they are not encoded ahead."""


@dataclass(frozen=True)
class DryRun:
    """A run that is resolved and described, and trains nothing.

    Args:
        lines: what there is to say.
        folder: where the run would write.
        console: where it is said; None is silent.
    """

    lines: tuple[str, ...]
    folder: Path
    console: Console | None = None

    def fit(self) -> RunResult:
        """Print the description."""
        for line in self.lines if self.console is not None else ():
            self.console.print(line, highlight=False, markup=False, soft_wrap=True)  # type: ignore[union-attr]
        return RunResult(self.folder, 0)


def build_run(
    config: TrainConfig,
    dataset: Any = None,
    console: Console | None = None,
    *,
    rewards: Mapping[str, Any] | None = None,
    trackers: Sequence[Tracker] = (),
) -> Trainer | DryRun:
    """Load and connect everything that a run needs.

    Args:
        config: the run.
        dataset: anything that ``load_examples`` takes, instead of ``config.data.dataset_name``.
        console: where to print; by default the terminal.
        rewards: those of ``config.reward.rewards`` that are Python objects, by label.
        trackers: told of the run's metrics besides those of ``config.run.report_to``.

    Returns:
        what has a ``fit()``: the trainer, or a description of the run when ``dry_run`` is set.

    Raises:
        UserError: for whatever cannot work, before the first step.
    """
    method = get_method(config.method)
    strategy: Strategy = method.strategy(config.method_config)
    check_options(strategy.spec, config)
    processes = Processes(may_shard=True)
    if processes.device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 where weights are float32: several times as fast
    if processes.shards > 1:
        refuse_unless_shardable(strategy.spec, config)
    console = (console or Console()) if processes.is_main else None
    plan = plan_batches(config.optim, processes.world_size)
    rate, rate_line = scaled_learning_rate(config.optim, plan.global_batch)
    claim = _claim(config, processes)
    folder = claim.path

    with claim.released(always=False):
        _check_resumed(config, folder, processes, _known_identity(config, plan))
        # what costs little and what users get wrong comes first: rewards, rows, the model; encoding may take hours
        domain = domain_of(strategy.spec.modality)
        trained_on, watched = _rewards(domain, strategy.spec, config, processes, rewards or {})
        named = (config.data.prompts or config.data.dataset_name) if dataset is None else dataset
        read = domain.read_data(named, strategy.spec.data, config)
        check_data(read, trained_on, strategy)
        policy, config = _policy(domain, config, processes)
        run = config.run
        ctx = _context(policy, strategy.spec, config, processes, trained_on)
        ctx.folder, ctx.global_batch = folder, plan.global_batch
        strategy.build(ctx)
        identity = _identity(config, ctx, plan)
        _check_resumed(config, folder, processes, asdict(identity))
        made: list[Observer | None] = []
        processes.together(lambda: made.append(domain.observer(policy, read, config, watched, processes, console)))
        data = domain.prepare_data(read, config, policy, processes, console)
        source = _source(data, config, plan, processes)
        ctx.total_steps = _total_steps(config, source, strategy.updates_per_batch)
        epochs = 0 if config.optim.max_train_steps else config.optim.num_train_epochs

        rate_line += rate_origin(config, strategy.spec)
        start = (f"method {method.name}: {method.summary}", model_line(config, policy), plan.equation, rate_line)
        header = (*start, *data.notes, *strategy.describe(ctx), f"{ctx.total_steps} optimizer steps")
        if run.dry_run:
            memory = _memory_lines(domain, data, strategy, ctx, config, plan, processes.shards)
            return DryRun(
                (*header, *memory, f"would write to {folder}; nothing was trained (--dry_run)"), folder, console
            )
        flat = {**config.flat(), "output_dir": str(folder)}
        card = partial(model_card, method.name, method.paper, domain.library, flat)
        metadata = {"method": method.name, **domain.weights_header(config, policy)}
        record = RunRecord(identity, flat, metadata=metadata, header=header, card=card)
        if processes.shards > 1:  # the last thing before training: all parameters are there, and identified
            shard(networks_of(ctx), processes.device, processes.shards)
        return Trainer(
            strategy, ctx, source, processes, optim=config.optim, run=run, learning_rate=rate, folder=folder,
            record=record, epochs=epochs, observer=made[0], trackers=trackers, console=console, claim=claim,
        )  # fmt: skip


def _claim(config: TrainConfig, processes: Processes) -> Claim:
    """Let the main process claim the run's folder, or only choose it for a dry run; all processes know it."""
    wanted = (config.run.output_dir, config.method, config.run.resume_from_checkpoint)
    claim = processes.on_main(lambda: Claim(choose_folder(*wanted)) if config.run.dry_run else claim_folder(*wanted))
    folder = processes.exchange(None if claim is None else claim.path)[0]
    assert folder is not None
    return claim or Claim(folder)


def _policy(domain: Domain, config: TrainConfig, processes: Processes) -> tuple[BasePolicy, TrainConfig]:
    """Load the policy, and complete the run by what it leaves to the model."""
    frozen_dtype = AUTOCAST[config.optim.mixed_precision] or torch.float32
    with processes.main_first():  # downloads happen once
        policy = domain.load_policy(config.model, frozen_dtype, processes.device)
    if START_ADAPTER in policy.adapters.names:  # its shape is that of the adapter that will train
        start = policy.adapters.settings(START_ADAPTER)
        alpha: Any = start.scale_numerator  # files of others may hold fractions
        shaped = replace(config.model, rank=start.rank, lora_alpha=alpha, lora_targets=list(start.targets))
        config = replace(config, model=shaped)
    return policy, domain.completed(config, policy)


def _check_resumed(config: TrainConfig, folder: Path, processes: Processes, known: Mapping[str, Any]) -> None:
    """Refuse early to continue another run; the trainer compares once more with the checkpoint that it reads."""
    what = config.run.resume_from_checkpoint
    if what is not None:
        processes.on_main(lambda: refuse_other_run(what, RunFolder(folder).checkpoints, known))


def _rewards(
    domain: Domain, spec: Spec, config: TrainConfig, processes: Processes, given: Mapping[str, Any]
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Load the rewards that are trained on and, on the main process, the one that early stopping watches, by label."""
    options = config.reward
    with processes.main_first():
        specs = parse_rewards(config.reward.rewards) if spec.needs_reward else []
        rewards = domain.load_rewards(specs, options, processes.device, given) if specs else {}
    check_rewards(rewards, spec, config)
    name, _, source = config.run.early_stop_reward.partition("@")
    watched = [RewardSpec(name, source=source or None)] if name else []
    if not watched:
        return rewards, {}
    return rewards, processes.on_main(lambda: domain.load_rewards(watched, options, processes.device, {})) or {}


def _context(
    policy: BasePolicy,
    spec: Spec,
    config: TrainConfig,
    processes: Processes,
    rewards: Mapping[str, Any],
) -> Context:
    """Make the policy trainable, and put together what the strategy sees."""
    reference, side = _start(policy, spec, config, processes), config.data.resolution
    return Context(
        policy=policy,
        reference=reference if spec.needs_reference else None,
        device=processes.device,
        seed=config.optim.seed,
        rewards=rewards,
        reward_weights={part.label: part.weight for part in parse_rewards(config.reward.rewards)} if rewards else {},
        skip_failed_rewards=config.reward.on_reward_failure == "skip",
        resolution=(side, side) if side else None,
        reduce=processes.sum,
        rank=processes.rank,
        world_size=processes.world_size,
        max_rows=config.optim.max_rows_per_forward,
        autocast=AUTOCAST[config.optim.mixed_precision],
    )


def _start(policy: BasePolicy, spec: Spec, config: TrainConfig, processes: Processes) -> Reference | None:
    """Make the policy trainable and return the frozen start of training."""
    model = config.model
    if spec.trains == "own":
        return None
    if model.train_mode == "lora":
        settings = LoraSettings(model.rank, model.lora_alpha, model.lora_dropout, tuple(model.lora_targets))
        reference: Reference = start_lora(policy, settings, config.optim.seed)
    elif spec.needs_reference:
        # processors are slow in half precision, and have the memory
        away = model.reference_device == "cpu"
        mixed = None if away else AUTOCAST[config.optim.mixed_precision]
        reference = start_full(policy, torch.device("cpu") if away else None, mixed)
    else:
        policy.train_weights()
        return None
    return CachedReference(reference, processes.exchange) if config.data.pinned_draws else reference


def _source(data: LoadedData, config: TrainConfig, plan: BatchPlan, processes: Processes) -> EncodedSource:
    options = LoaderOptions(
        seed=config.optim.seed,
        micro_batch=plan.micro,
        accumulation=plan.accumulation,
        rank=processes.rank,
        world_size=processes.world_size,
        pinned_draws=config.data.pinned_draws,
        prefetch=0 if config.data.cache_latents and not config.data.streaming else _PREFETCHED,
        lockstep=processes.shards > 1,
    )
    return EncodedSource(ExampleLoader(data.examples, options, data.prepare), data.encode, data.left_out)


def _total_steps(config: TrainConfig, source: EncodedSource, updates_per_batch: int) -> int:
    if config.optim.max_train_steps:
        return config.optim.max_train_steps
    if source.steps_per_epoch is None:
        raise UserError("a streamed data set has no length: give --max_train_steps")
    return source.steps_per_epoch * config.optim.num_train_epochs * updates_per_batch


def _known_identity(config: TrainConfig, plan: BatchPlan) -> dict[str, Any]:
    """Return what is known of a run's identity before its model is loaded."""
    return {
        "method": config.method,
        "model": config.model.pretrained_model_name_or_path,
        "train_mode": config.model.train_mode,
        "global_batch": plan.global_batch,
        "pinned_draws": bool(config.data.pinned_draws),
    }


def _identity(config: TrainConfig, ctx: Context, plan: BatchPlan) -> RunIdentity:
    """Return the run's identity; the adapter that is trained may have its shape of one that training starts from."""
    adapters = ctx.policy.adapters
    trained = adapters.settings(DEFAULT_ADAPTER) if DEFAULT_ADAPTER in adapters.names else None
    return RunIdentity(
        **_known_identity(config, plan),
        rank=trained.rank if trained else 0,
        lora_targets=", ".join(trained.targets) if trained else "",
        reference=ctx.reference.identity if ctx.reference is not None else "",
    )


def _memory_lines(
    domain: Domain,
    data: LoadedData,
    strategy: Strategy,
    ctx: Context,
    config: TrainConfig,
    plan: BatchPlan,
    shards: int,
) -> list[str]:
    """Estimate memory and refuse what cannot fit."""
    rows = strategy.rows_per_pass or plan.micro * data.rows_per_example
    if ctx.max_rows:
        rows = min(rows, ctx.max_rows)
    trained = Trainables(strategy, ctx.policy).count
    saved = domain.activation_bytes(ctx.policy, config)
    needed = estimate(Networks.of(ctx), trained, config.flat(), saved, rows, shards)
    warnings = refuse_if_too_large(needed, ctx.device)
    return [f"{trained:,} trained parameters", *needed.lines(), *warnings]
