"""What a run is made of: typed option groups, flat names outside (command line, YAML, Python), groups inside.

Names follow diffusers' training scripts. Contradictions are refused here, before any model loads.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from diffalign.errors import UserError, require_at_least

SAME_DEVICE = "same"
"""Where rewards are unless they are told otherwise: with the model."""


@dataclass(frozen=True)
class ModelOptions:
    """Model and adapters.

    Args:
        pretrained_model_name_or_path: hub name, local folder, run folder, or a bundled name such as "tiny-sd".
        preset: published hyper-parameters to start from (docs/recipes.md): sd15, sdxl, sd3, or a bundled model's; where
            it is not given, those of the model's name; "none" for none.
        revision: revision on the hub.
        variant: weight file variant, for example "fp16".
        drop_text_encoder_3: train and sample Stable Diffusion 3 without its third text encoder (T5).
        train_mode: adapters on a frozen base, or all weights of the denoiser with a frozen copy as reference.
        rank: rank of the LoRA adapters. 16: ours (diffusers' commands for Diffusion-DPO: 8).
        lora_alpha: LoRA scale numerator; 0 means equal to the rank (scale 1).
        lora_dropout: dropout inside the adapters; not for methods that replay their own samples.
        lora_targets: module name suffixes that adapters attach to; empty for the family's own.
        start_adapter: folder of an adapter that training starts from; it is then the reference too.
        reference_device: where the frozen copy of full fine-tuning is kept and computed ("same", or "cpu", which
            is slow: minutes a step for the largest models).
        attention_backend: attention kernels by name.
        gradient_checkpointing: trade time for activation memory.
    """

    pretrained_model_name_or_path: str = "tiny-sd"
    preset: str = "none"
    revision: str | None = None
    variant: str | None = None
    drop_text_encoder_3: bool = False
    train_mode: Literal["lora", "full"] = "lora"
    rank: int = 16
    lora_alpha: int = 0
    lora_dropout: float = 0.0
    lora_targets: list[str] = field(default_factory=list)
    start_adapter: str | None = None
    reference_device: Literal["same", "cpu"] = "same"
    attention_backend: Literal["sdpa", "xformers", "flash", "flex"] = "sdpa"
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        require(self.rank > 0, f"--rank must be positive, not {self.rank}")
        require_at_least(0, self, "lora_alpha")
        require(0 <= self.lora_dropout < 1, f"--lora_dropout must lie in [0, 1), not {self.lora_dropout}")


@dataclass(frozen=True)
class DataOptions:
    """Data and how it is seen.

    Args:
        dataset_name: "bundled", "rendered", a hub name, or a local file or folder (parquet, jsonl, csv, images,
            webdataset tar).
        dataset_config_name: configuration of a hub data set.
        train_split: split to train on.
        data_format: how the source is laid out; "auto" looks at it.
        column_map: expected column -> column of the source, for example {"prompt": "caption"}.
        default_prompt: caption of pictures in a folder that have no text file beside them.
        pairing: how ranked lists become pairs where a method wants pairs.
        pair_margin: smallest score difference of a pair made from a list.
        resolution: side of the training images in pixels; 0 for the model's own.
        center_crop: crop the centre instead of a random place (decided once an example).
        random_flip: mirror half of the examples (decided once an example).
        aspect_buckets: group examples of like shape instead of cropping all to squares.
        caption_dropout: probability that an example is trained with the empty caption, decided once an example.
        max_train_samples: use only so many examples; 0 for all.
        held_out_prompts: take so many captions out of training, with all their examples, to look at and judge the run
            by; of a data set that brings held-out captions, those.
        streaming: read the source as a stream.
        strict: refuse a data set with unreadable images instead of skipping and counting them.
        cache_dir: folder for latents and prompt embeddings; None keeps them in memory.
        cache_latents: encode every image and caption once, before the first step.
        pinned_draws: give each example this many fixed (noise, timestep) draws so that reference values are cached;
            0 draws anew at each visit.
        prompts: captions instead of ``dataset_name`` for methods that make their own samples: a text file with one
            caption a line, or any data set with a column ``prompt`` (and ``metadata`` where a reward needs it).
        max_length: longest sequence of text in tokens, prompt and completion together; 0 for the model's own.
    """

    dataset_name: str = "bundled"
    dataset_config_name: str | None = None
    train_split: str = "train"
    data_format: str = "auto"
    column_map: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    pairing: Literal["best_worst", "all", "adjacent", "tournament"] = "best_worst"
    pair_margin: float = 0.0
    resolution: int = 0
    center_crop: bool = True
    random_flip: bool = False
    aspect_buckets: bool = False
    caption_dropout: float = 0.0
    max_train_samples: int = 0
    held_out_prompts: int = 0
    streaming: bool = False
    strict: bool = False
    cache_dir: str | None = None
    cache_latents: bool = True
    pinned_draws: int = 0
    prompts: str | None = None
    max_length: int = 0

    def __post_init__(self) -> None:
        require(0 <= self.caption_dropout <= 1, f"--caption_dropout must lie in [0, 1], not {self.caption_dropout}")
        counts = ("max_length", "pinned_draws", "max_train_samples", "held_out_prompts")
        require_at_least(0, self, *counts, "pair_margin", "resolution")
        require(not (self.streaming and self.pinned_draws), "--pinned_draws needs a data set that is not streamed")


@dataclass(frozen=True)
class RewardOptions:
    """Rewards of methods that learn from them.

    Args:
        rewards: ``NAME[@SOURCE][:WEIGHT]`` separated by commas, or a YAML file (``docs/rewards.md``).
        on_reward_failure: what happens to an image for which a reward raises or gives no finite number: "stop" saves it
            and ends the run, "skip" saves it, leaves it out and counts it.
        reward_dtype: type in which networks of rewards compute, of all that judge the run; where it is not given,
            float32, and bfloat16 for large vision-language models (hpsv3, judges) on CUDA.
        reward_device: where they are: "same" as the model, "cpu", "cuda:N".
    """

    rewards: str = ""
    on_reward_failure: Literal["stop", "skip"] = "stop"
    reward_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    reward_device: str = SAME_DEVICE


@dataclass(frozen=True)
class OptimOptions:
    """Optimisation.

    Args:
        train_batch_size: examples in one forward pass on one device (micro batch).
        gradient_accumulation_steps: micro batches in one optimizer step; 0 derives it from the global batch.
        global_batch_pairs: examples in one optimizer step over all devices; 0 derives it from the other two.
        max_rows_per_forward: largest number of images in one pass with a graph; 0 for no limit. Smaller values need
            less memory and one more forward pass; the gradient stays exact.
        max_train_steps: optimizer steps; 0 derives them from the epochs.
        num_train_epochs: passes over the data when no number of steps is given.
        learning_rate: the rate that is used, after ``scale_lr`` if a rule is named. 1e-5: diffusers' commands for
            Diffusion-DPO with LoRA.
        scale_lr: rule that multiplies the rate by the global batch or its root; "none" leaves it.
        lr_scheduler: shape of the rate over the run.
        lr_warmup_steps: optimizer steps of linear warm-up.
        optimizer: by name; adamw8bit needs the quant extra, adafactor steps by the given rate itself.
        sgd_momentum: Nesterov momentum of sgd.
        adam_beta1: first moment decay. This and the next four: diffusers' training scripts.
        adam_beta2: second moment decay.
        adam_epsilon: added to the denominator.
        adam_weight_decay: decoupled weight decay.
        max_grad_norm: clip the global gradient norm; 0 switches clipping off.
        use_ema: keep an exponential moving average of the trained weights and export that.
        ema_decay: its decay a step. 0.999: ours, for runs of thousands of steps.
        mixed_precision: autocast type, and type of frozen weights; where it is not given, what ``accelerate launch
            --mixed_precision`` says.
        seed: the run's seed.
    """

    train_batch_size: int = 4
    gradient_accumulation_steps: int = 0
    global_batch_pairs: int = 0
    max_rows_per_forward: int = 0
    max_train_steps: int = 0
    num_train_epochs: int = 1
    learning_rate: float = 1e-5
    scale_lr: Literal["none", "linear", "sqrt"] = "none"
    lr_scheduler: Literal["constant", "linear", "cosine", "constant_with_warmup"] = "constant_with_warmup"
    lr_warmup_steps: int = 0
    optimizer: Literal["adamw", "adamw8bit", "adafactor", "sgd"] = "adamw"
    sgd_momentum: float = 0.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    adam_weight_decay: float = 1e-2
    max_grad_norm: float = 1.0
    use_ema: bool = False
    ema_decay: float = 0.999
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    seed: int = 0

    def __post_init__(self) -> None:
        require_at_least(1, self, "train_batch_size")
        counts = ("gradient_accumulation_steps", "global_batch_pairs", "max_rows_per_forward", "max_train_steps")
        require_at_least(0, self, *counts, "num_train_epochs", "lr_warmup_steps", "adam_weight_decay", "max_grad_norm")
        for name in ("sgd_momentum", "adam_beta1", "adam_beta2", "ema_decay"):
            value = getattr(self, name)
            require(0 <= value < 1, f"--{name} must lie in [0, 1), not {value}")
        require(self.adam_epsilon > 0, f"--adam_epsilon must be positive, not {self.adam_epsilon}")
        require(self.learning_rate > 0, f"--learning_rate must be positive, not {self.learning_rate}")
        require(self.num_train_epochs > 0 or self.max_train_steps > 0, "give --max_train_steps or --num_train_epochs")


@dataclass(frozen=True)
class RunOptions:
    """Output, logging, checkpoints, guards, validation.

    Args:
        output_dir: run folder; empty for the next free ``runs/<method>-NNN``.
        resume_from_checkpoint: "latest", or a checkpoint folder; needs the run's ``--output_dir``.
        checkpointing_steps: save every so many optimizer steps; 0 only at the end.
        checkpoints_total_limit: how many checkpoints are kept; 0 for all.
        report_to: trackers besides ``metrics.jsonl``; "[]" for none. TensorBoard writes into the run folder; Weights &
            Biases stays offline with ``WANDB_MODE=offline``.
        logging_steps: write metrics every so many optimizer steps.
        validation_prompts: captions drawn before and after (and every ``validation_steps``) with the same seeds, or a
            file of them (``.txt`` with one a line, ``.jsonl``); empty for held-out ones, else the data set's own.
        validation_steps: draw the grid every so many steps; 0 only at start and end.
        num_validation_images: how many of them.
        num_inference_steps: sampling steps for validation and evaluation; 0 for those of the model's pipeline in
            diffusers (50 for SD1.x and SDXL, 28 for SD3).
        guidance_scale: guidance for validation and evaluation, 1 for none; 0 for that of the model's pipeline in
            diffusers (7.5 for SD1.x, 5 for SDXL, 7 for SD3).
        evaluation_prompts: held-out captions scored before and after the run, where the data set has a verifier or
            proxy reward; 0 switches it off.
        early_stop_reward: reward that watches the run and is not trained on, ``NAME[@SOURCE]`` (``docs/rewards.md``);
            judged every ``validation_steps`` on ``evaluation_prompts``, else ``validation_prompts``, else others that
            are held out.
        early_stop_prompts: captions that it judges at most, besides those of ``evaluation_prompts``. 64: ours.
        early_stop_patience: end the run after so many validations in a row without a new best of that reward, and keep
            the weights of the best.
        guard_patience: stop after so many consecutive steps with a zero or non-finite loss or gradient. 3: ours.
        spike_factor: skip a step whose gradient norm exceeds this multiple of its running median; 0 never skips. 20:
            ours.
        max_skipped_steps: stop, with advice, after so many skipped steps. 10: ours.
        dry_run: resolve everything, estimate memory, print, train nothing.
    """

    output_dir: str = ""
    resume_from_checkpoint: str | None = None
    checkpointing_steps: int = 0
    checkpoints_total_limit: int = 3
    report_to: list[Literal["tensorboard", "wandb"]] = field(default_factory=lambda: ["tensorboard"])
    logging_steps: int = 1
    validation_prompts: list[str] = field(default_factory=list)
    validation_steps: int = 0
    num_validation_images: int = 8
    num_inference_steps: int = 0
    guidance_scale: float = 0.0
    evaluation_prompts: int = 0
    early_stop_reward: str = ""
    early_stop_prompts: int = 64
    early_stop_patience: int = 3
    guard_patience: int = 3
    spike_factor: float = 20.0
    max_skipped_steps: int = 10
    dry_run: bool = False

    def __post_init__(self) -> None:
        require_at_least(1, self, "early_stop_prompts", "early_stop_patience", "guard_patience", "logging_steps")
        intervals = ("checkpointing_steps", "checkpoints_total_limit", "validation_steps", "max_skipped_steps")
        sampling = ("num_validation_images", "num_inference_steps", "evaluation_prompts", "guidance_scale")
        require_at_least(0, self, *intervals, *sampling, "spike_factor")
        require(
            not self.early_stop_reward or self.validation_steps > 0,
            "--early_stop_reward is judged every --validation_steps: give that too",
        )


GROUPS: dict[str, type] = {
    "model": ModelOptions,
    "data": DataOptions,
    "reward": RewardOptions,
    "optim": OptimOptions,
    "run": RunOptions,
}


@dataclass(frozen=True)
class TrainConfig:
    """A whole run: the method's name, its own configuration, and the option groups."""

    method: str
    method_config: Any
    model: ModelOptions = field(default_factory=ModelOptions)
    data: DataOptions = field(default_factory=DataOptions)
    reward: RewardOptions = field(default_factory=RewardOptions)
    optim: OptimOptions = field(default_factory=OptimOptions)
    run: RunOptions = field(default_factory=RunOptions)

    def flat(self) -> dict[str, Any]:
        """Return all options under their outside names, as YAML and the command line spell them."""
        values: dict[str, Any] = {"method": self.method}
        for part in (self.method_config, *(getattr(self, name) for name in GROUPS)):
            values.update(asdict(part))
        return values

    @classmethod
    def from_flat(cls, method: str, config_class: type, values: dict[str, Any]) -> TrainConfig:
        """Build a run from outside names.

        Args:
            method: the method's name.
            config_class: the method's configuration dataclass.
            values: option -> value; names not given take their defaults.

        Raises:
            UserError: for unknown options and contradictions.
        """
        known = option_defaults(config_class)
        for name in values:
            if name not in known:
                from diffalign.errors import unknown

                raise unknown(f"option of method {method!r}", name, known)
        groups = {
            key: group(**{f.name: values[f.name] for f in fields(group) if f.name in values})
            for key, group in GROUPS.items()
        }
        own = {f.name: values[f.name] for f in fields(config_class) if f.name in values}
        return cls(method, config_class(**own), **groups)


def option_defaults(config_class: type) -> dict[str, Any]:
    """Return every option of a run with a method of this configuration, with its default."""
    defaults: dict[str, Any] = {}
    for part in (config_class, *GROUPS.values()):
        for f in fields(part):
            if f.name in defaults:
                raise ValueError(
                    f"{config_class.__name__}.{f.name} hides the option of the same name of {part.__name__}"
                )
            defaults[f.name] = f.default_factory() if callable(f.default_factory) else f.default
    return defaults


def require(condition: bool, message: str) -> None:
    """Raise a :class:`UserError` unless the condition holds."""
    if not condition:
        raise UserError(message)
