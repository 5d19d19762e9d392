"""From a configuration to a run that is ready to start."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffalign.data.loader import ExampleLoader, LoaderOptions
from diffalign.errors import UserError
from diffalign.policies.adapters import LoraSettings
from diffalign.policies.base import BasePolicy
from diffalign.references import CachedReference, Reference, start_full, start_lora
from diffalign.rewards.compose import parse_rewards
from diffalign.strategies.base import Context, Spec, Strategy
from diffalign.strategies.registry import get_method
from diffalign.training.checkpoint import RunIdentity
from diffalign.training.config import BatchPlan, TrainConfig, plan_batches
from diffalign.training.domain import Domain, LoadedData, domain_of
from diffalign.training.launch import launched_precision
from diffalign.training.loop import RunRecord, RunResult, Trainer
from diffalign.training.memory import Networks, estimate, refuse_if_too_large
from diffalign.training.optim import scaled_learning_rate
from diffalign.training.processes import Processes
from diffalign.training.runfolder import Claim, choose_folder, claim_folder, model_card
from diffalign.training.sharding import networks_of, refuse_unless_shardable, shard
from diffalign.training.source import EncodedSource
from diffalign.training.step import AUTOCAST
from diffalign.training.trackers import Tracker
from diffalign.training.trainables import Trainables

_PREFETCHED_STEPS = 2


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
    _check(strategy.spec, config)
    processes = Processes(may_shard=True)
    if processes.shards > 1:
        refuse_unless_shardable(strategy.spec, config)
    console = (console or Console()) if processes.is_main else None
    plan = plan_batches(config.optim, processes.world_size)
    rate, rate_line = scaled_learning_rate(config.optim, plan.global_batch)
    claim = _claim(config, processes)
    folder = claim.path

    with claim.released(always=False):
        domain = domain_of(strategy.spec.modality)
        policy, config = _policy(domain, config, processes)
        run = config.run
        ctx = _context(domain, policy, strategy.spec, config, processes, rewards or {})
        ctx.folder, ctx.global_batch = folder, plan.global_batch
        strategy.build(ctx)
        named = (config.data.prompts or config.data.dataset_name) if dataset is None else dataset
        data = domain.load_data(named, strategy.spec.data, config, ctx.policy, processes, console)
        _require_metadata(ctx, data)
        source = _source(data, config, plan, processes)
        ctx.total_steps = _total_steps(config, source, strategy.updates_per_batch)

        header = (f"method {method.name}: {method.summary}", plan.equation, rate_line, *data.notes)
        header += (*strategy.describe(ctx), f"{ctx.total_steps} optimizer steps")
        if run.dry_run:
            memory = _memory_lines(domain, data, strategy, ctx, config, plan, processes.shards)
            return DryRun(
                (*header, *memory, f"would write to {folder}; nothing was trained (--dry_run)"), folder, console
            )
        flat = {**config.flat(), "output_dir": str(folder)}
        record = RunRecord(
            identity=_identity(config, ctx),
            config=flat,
            metadata={"method": method.name},
            header=header,
            card=partial(model_card, method.name, method.paper, domain.library, flat),
        )
        if processes.shards > 1:  # the last thing before training: all parameters are there, and identified
            shard(networks_of(ctx), processes.device, processes.shards)
        return Trainer(
            strategy,
            ctx,
            source,
            processes,
            optim=config.optim,
            run=run,
            learning_rate=rate,
            folder=folder,
            record=record,
            observer=processes.on_main(lambda: domain.observer(ctx.policy, data, config, console)),
            trackers=trackers,
            console=console,
            claim=claim,
        )


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
    return policy, domain.completed(config, policy)


def _context(
    domain: Domain,
    policy: BasePolicy,
    spec: Spec,
    config: TrainConfig,
    processes: Processes,
    given: Mapping[str, Any],
) -> Context:
    """Load the rewards, make the policy trainable, and put together what the strategy sees."""
    with processes.main_first():
        specs = parse_rewards(config.reward.rewards) if spec.needs_reward else []
        rewards = domain.load_rewards(specs, processes.device, given) if specs else {}
    _check_rewards(rewards, spec, config)
    reference = _start(policy, spec, config, processes)
    return Context(
        policy=policy,
        reference=reference if spec.needs_reference else None,
        device=processes.device,
        seed=config.optim.seed,
        rewards=rewards,
        reward_weights={reward.label: reward.weight for reward in specs},
        skip_failed_rewards=config.reward.on_reward_failure == "skip",
        reduce=processes.sum,
        rank=processes.rank,
        world_size=processes.world_size,
        max_rows=config.optim.max_rows_per_forward,
    )


def _check(spec: Spec, config: TrainConfig) -> None:
    """Refuse contradictions between method and options before anything is loaded."""
    launched, own = launched_precision(os.environ), config.optim.mixed_precision
    if launched and own != launched:
        raise UserError(
            f"accelerate is configured for --mixed_precision {launched}, but the run's own --mixed_precision is {own}: "
            "say it in one place"
        )
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
    if spec.needs_reward and not config.reward.rewards:
        raise UserError(f"{config.method!r} learns from a reward: name one or more with --rewards, such as pickscore")
    if not spec.needs_reward and config.reward.rewards:
        raise UserError(f"{config.method!r} uses no reward: leave --rewards out")
    watched = config.run.early_stop_reward
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
    if config.model.train_mode == "full" and config.model.start_adapter:
        raise UserError("--start_adapter needs --train_mode lora: all weights cannot train beside an adapter")


def _check_rewards(rewards: Mapping[str, Any], spec: Spec, config: TrainConfig) -> None:
    """Refuse rewards without gradients where the method needs them."""
    flat = [name for name, reward in rewards.items() if not reward.info.differentiable]
    if spec.needs_reward == "differentiable" and flat:
        raise UserError(f"{config.method!r} differentiates its rewards, but {', '.join(flat)} has no gradient")


def _require_metadata(ctx: Context, data: LoadedData) -> None:
    """Refuse captions without a description where a reward reads it."""
    readers = [name for name, reward in ctx.rewards.items() if reward.info.needs_metadata]
    examples = [] if hasattr(data.examples, "open") else data.examples
    if readers and not all(example.metadata for example in examples):
        raise UserError(
            f"the reward {', '.join(readers)} reads a description of each caption, which these captions lack: give "
            "them a column 'metadata' (GenEval's row format), or choose another reward"
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
        prefetch=0 if config.data.cache_latents and not config.data.streaming else _PREFETCHED_STEPS,
        lockstep=processes.shards > 1,
    )
    return EncodedSource(ExampleLoader(data.examples, options, data.prepare), data.encode)


def _total_steps(config: TrainConfig, source: EncodedSource, updates_per_batch: int) -> int:
    if config.optim.max_train_steps:
        return config.optim.max_train_steps
    if source.steps_per_epoch is None:
        raise UserError("a streamed data set has no length: give --max_train_steps")
    return source.steps_per_epoch * config.optim.num_train_epochs * updates_per_batch


def _identity(config: TrainConfig, ctx: Context) -> RunIdentity:
    model = config.model
    return RunIdentity(
        method=config.method,
        model=model.pretrained_model_name_or_path,
        train_mode=model.train_mode,
        rank=model.rank if model.train_mode == "lora" else 0,
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
    refuse_if_too_large(needed, ctx.device)
    return [f"{trained:,} trained parameters", *needed.lines()]
