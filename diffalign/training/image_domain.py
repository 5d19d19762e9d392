"""Image runs: diffusion policies, data sets of images, validation grids and held-out scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from diffalign.batch import Condition
from diffalign.data.cache import LatentCache, PromptCache, TensorStore
from diffalign.data.encode import EncoderOptions, ImageEncoder
from diffalign.data.held_out import hold_out
from diffalign.data.load import drop_unreadable, load_examples, with_aspect_buckets
from diffalign.data.loader import ExampleLoader, LoaderOptions
from diffalign.data.pairing import PairingOptions
from diffalign.data.prepare import FramingOptions
from diffalign.data.readers import SourceOptions
from diffalign.data.schema import SKIPPED, Example, ExampleSet, StreamSet, describe_notes, kind_info
from diffalign.evaluation.evaluator import ImageEvaluator
from diffalign.policies.adapters import START_ADAPTER
from diffalign.policies.base import Policy
from diffalign.policies.components import PipelinePolicy
from diffalign.policies.loading import load_adapter, load_policy
from diffalign.rewards.base import Reward
from diffalign.rewards.compose import RewardSpec, load_parts
from diffalign.rewards.loading import load_reward
from diffalign.strategies.base import DataKind
from diffalign.training.batch_plan import plan_batches
from diffalign.training.config import SAME_DEVICE, DataOptions, ModelOptions, RewardOptions, TrainConfig
from diffalign.training.domain import Domain, LoadedData
from diffalign.training.judged import looked_at
from diffalign.training.memory import saved_bytes
from diffalign.training.observing import Observer
from diffalign.training.processes import Processes
from diffalign.training.progress import work_shown
from diffalign.training.validation import ImageObserver

_ADVICE = (
    "note: each of {} processes encodes the whole data set and keeps all of it in memory; with --cache_dir they share "
    "the work, and the disk"
)


class ImageDomain(Domain):
    """Text-to-image models."""

    def load_policy(self, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> Policy:
        policy = load_policy(
            options.pretrained_model_name_or_path,
            dtype=dtype,
            denoiser_dtype=torch.float32 if options.train_mode == "full" else None,
            device=device,
            revision=options.revision,
            variant=options.variant,
            drop_text_encoder_3=options.drop_text_encoder_3,
            attention_backend=options.attention_backend,
            gradient_checkpointing=options.gradient_checkpointing,
        )
        if options.start_adapter:
            load_adapter(policy, options.start_adapter, START_ADAPTER)  # type: ignore[arg-type]
        return policy

    def completed(self, config: TrainConfig, policy: PipelinePolicy) -> TrainConfig:
        side, run = config.data.resolution, config.run
        if side:
            policy.process = policy.process_for(side, side)
        steps, guidance = policy.usual_sampling
        steps, guidance = run.num_inference_steps or steps, run.guidance_scale or guidance
        return replace(config, run=replace(run, num_inference_steps=steps, guidance_scale=guidance))

    def weights_header(self, config: TrainConfig, policy: Policy) -> Mapping[str, str]:
        height, width = _resolution(config, policy)
        return {"resolution": f"{height}x{width}"}

    def load_rewards(
        self, specs: Sequence[RewardSpec], options: RewardOptions, device: torch.device, given: Mapping[str, Reward]
    ) -> Mapping[str, Reward]:
        return load_parts(specs, *_place_of_rewards(options, device), given)

    def read_data(self, source: Any, kind: DataKind, config: TrainConfig) -> ExampleSet[Example] | StreamSet:
        found = load_examples(source, kind, _source_options(config.data, config.optim.seed))
        dataset = hold_out(found, config.data.held_out_prompts)
        looked_at(config, dataset)  # refused before a model loads
        return dataset

    def prepare_data(
        self,
        dataset: ExampleSet[Example] | StreamSet,
        config: TrainConfig,
        policy: Policy,
        processes: Processes,
        console: Console | None = None,
    ) -> LoadedData:
        options = config.data
        store = Path(options.cache_dir).expanduser() if options.cache_dir else None
        fixed = (options.center_crop and not options.random_flip) or options.cache_latents
        encoder = ImageEncoder(
            policy,
            dataset.kind,
            EncoderOptions(
                FramingOptions(
                    resolution=(options.resolution, options.resolution) if options.resolution else None,
                    center_crop=options.center_crop,
                    random_flip=options.random_flip,
                    fixed=fixed,
                    seed=config.optim.seed,
                ),
                caption_dropout=options.caption_dropout,
                encoder_id=policy.encoder_id,
                strict=options.strict,
            ),
            LatentCache(TensorStore(store / "latents")) if store else None,
            PromptCache(TensorStore(store / "prompts")) if store else None,
        )
        if isinstance(dataset, StreamSet):
            # passes of a network in shards want micro-batches of one size, so nothing may be left out of them
            whole = options.strict or processes.shards > 1
            prepare = encoder.prepare if whole else encoder.prepare.readable
            rows = max(1, kind_info(dataset.kind).blocks)
            notes = (f"data {dataset.name}: a stream; what is left out of it is counted as it is read",)
            # every process reads all rows, and decodes the images of its own examples
            of_rows = dataset.notes if processes.is_main else {}
            return LoadedData(
                dataset, encoder, prepare, rows, notes, lambda: {**of_rows, SKIPPED: len(encoder.prepare.skipped)}
            )
        if options.aspect_buckets:
            dataset = with_aspect_buckets(dataset, encoder.prepare.resolution, team=processes)
        visited = _visited(dataset, config, processes)
        whole = len(visited) == len(dataset)
        ahead = options.cache_latents and not config.run.dry_run
        if ahead and store is None and processes.world_size > 1 and console is not None:
            console.print(_ADVICE.format(processes.world_size), highlight=False, markup=False, soft_wrap=True)
        with work_shown(console) as progress:
            seen = dataset.with_examples(visited)
            if ahead:
                seen = encoder.precompute(seen, processes, progress)
            elif not config.run.dry_run:
                seen = drop_unreadable(seen, options.strict, processes, progress)
        if options.cache_latents:
            policy.offload_text_encoders()
        count = f"{len(seen)} examples" if whole else f"{len(dataset)} examples, {len(visited)} of them in this run"
        notes = (f"data {dataset.name}: {count}; {describe_notes(seen.notes)}",)
        rows = max(1, max(len(example.images) for example in seen.examples))
        if whole:
            return LoadedData(seen.examples, encoder, encoder.prepare, rows, notes)
        # the order of a run is that of all its data, those that cannot be read included: they are left out as they come
        return LoadedData(dataset.examples, encoder, encoder.prepare.readable, rows, notes)

    def activation_bytes(self, policy: Policy, config: TrainConfig) -> int:
        height, width = _resolution(config, policy)
        latents = torch.empty(1, *policy.latent_shape(height, width), device="meta", dtype=policy.dtype)
        condition = policy.with_size(policy.null_condition(1), {"original_size": torch.tensor([[height, width]])})
        ghostly = Condition({name: value.to("meta") for name, value in condition.tensors.items()})
        timesteps = torch.zeros(1, device="meta", dtype=torch.long)
        return saved_bytes(
            policy.module, lambda module: policy.with_module(module).predict(latents, timesteps, ghostly)
        )

    def observer(
        self,
        policy: Policy,
        dataset: ExampleSet[Example] | StreamSet,
        config: TrainConfig,
        judges: Mapping[str, Reward],
        processes: Processes,
        console: Any,
    ) -> Observer | None:
        run, captions = config.run, looked_at(config, dataset)
        judged, watched = captions.judged, run.early_stop_reward
        if not captions.grid and judged is None:
            return None
        evaluator = None
        if judged is not None:
            names = dict.fromkeys([*judged.rewards, *([watched] if watched else [])])
            loaded, place = names if processes.is_main else (), _place_of_rewards(config.reward, policy.device)
            rewards = {name: judges.get(name) or load_reward(name, *place) for name in loaded}
            captions.require_descriptions(rewards)
            if console is not None and (known := captions.trained_on(dataset)):
                note = f"note: {known} of {len(judged.prompts)} captions that --early_stop_reward judges are trained on"
                console.print(note, highlight=False, markup=False, soft_wrap=True)
            evaluator = ImageEvaluator(
                prompts=judged.prompts,
                metadata=judged.metadata,
                seeds=range(len(judged.prompts)),
                rewards=rewards,
                primary=next(iter(names)),
                resolution=_resolution(config, policy),
            )
        return ImageObserver(policy, captions, evaluator, run, _resolution(config, policy), processes, console, watched)


def _visited(dataset: ExampleSet[Example], config: TrainConfig, processes: Processes) -> Sequence[Example]:
    """Return the examples that a run comes to see, so that no others are decoded or encoded.

    A short run on a large data set sees few of them. Networks in shards want micro-batches of one size, so there all
    are looked at, and the unreadable ones left out before the first step.
    """
    if not config.optim.max_train_steps or processes.shards > 1:
        return dataset.examples
    plan = plan_batches(config.optim, processes.world_size)
    order = LoaderOptions(seed=config.optim.seed, micro_batch=plan.global_batch)
    return ExampleLoader(dataset.examples, order).first_examples(config.optim.max_train_steps)


def _place_of_rewards(options: RewardOptions, device: torch.device) -> tuple[torch.device, torch.dtype | None]:
    """Return where networks of rewards are, and their type; None for their own."""
    place = device if options.reward_device == SAME_DEVICE else torch.device(options.reward_device)
    return place, getattr(torch, options.reward_dtype) if options.reward_dtype else None


def _resolution(config: TrainConfig, policy: Policy) -> tuple[int, int]:
    """Return (height, width) of the run's images in pixels."""
    side = config.data.resolution
    return (side, side) if side else policy.default_resolution


def _source_options(options: DataOptions, seed: int) -> SourceOptions:
    return SourceOptions(
        split=options.train_split,
        config=options.dataset_config_name,
        data_format=options.data_format,
        column_map=options.column_map,
        default_prompt=options.default_prompt,
        streaming=options.streaming,
        max_samples=options.max_train_samples,
        pairing=PairingOptions(options.pairing, options.pair_margin),
        seed=seed,
    )
