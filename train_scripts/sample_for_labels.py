"""Sample images for people to compare: ``python train_scripts/sample_for_labels.py --prompts captions.txt``.

The images, and the table that ``diffalign label serve`` takes, go into ``--output_dir``. After labelling, D3PO learns
from the exported file, with the same model and sampling options: the table has them on record, and a run with others is
refused. Its documentation tells the whole way.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse import ArgumentParser

from diffalign.cli.main import run_command
from diffalign.data.load import load_examples
from diffalign.data.readers import SourceOptions
from diffalign.data.schema import ExampleSet
from diffalign.device import AUTO, choose_device
from diffalign.policies.components import PipelinePolicy
from diffalign.policies.loading import load_adapter, load_policy
from diffalign.rollouts.labelled import write_samples
from diffalign.strategies.d3po import D3POConfig
from diffalign.training.step import AUTOCAST


def main() -> int:
    """Read options, sample, and say where the images are."""
    options = _parser().parse_args()
    dataset = load_examples(options.prompts, "prompts", SourceOptions(max_samples=options.max_prompts))
    assert isinstance(dataset, ExampleSet)  # nothing is streamed
    captions = [example.prompts[0] for example in dataset.examples]
    config = D3POConfig(**{field.name: getattr(options, field.name) for field in fields(D3POConfig)})
    size = (options.resolution, options.resolution) if options.resolution else None
    autocast = AUTOCAST[options.mixed_precision]
    policy = _policy(options)
    table = write_samples(policy, captions, config, options.seed, options.output_dir, size, autocast)
    sys.stdout.write(f"{len(captions)} x {config.images_per_prompt} images; next: diffalign label serve {table}\n")
    return 0


def _parser() -> ArgumentParser:
    parser = ArgumentParser(description="Sample images for people to compare.")
    parser.add_argument("--pretrained_model_name_or_path", type=str, default="tiny-sd", help="the model")
    parser.add_argument("--adapter", type=str | None, default=None, help="folder of an adapter: a later round")
    parser.add_argument("--prompts", type=str, default="bundled", help="captions: a text file, or any data set")
    parser.add_argument("--max_prompts", type=int, default=0, help="use only so many captions; 0 for all")
    parser.add_argument("--output_dir", type=Path, required=True, help="where images and table go")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other images")
    parser.add_argument("--device", type=str, default=AUTO, help="auto is an accelerator where there is one")
    alike = parser.add_argument_group("as the run will have them")
    alike.add_argument("--resolution", type=int, default=0, help="side of the images; 0 for the model's own")
    alike.add_argument("--mixed_precision", type=Literal["no", "fp16", "bf16"], default="no", help="type of products")
    alike.add_argument("--train_mode", type=Literal["lora", "full"], default="lora", help="type of the weights")
    alike.add_argument("--revision", type=str | None, default=None, help="of the model's files")
    alike.add_argument("--variant", type=str | None, default=None, help="of the model's files")
    alike.add_argument("--drop_text_encoder_3", type=bool, default=False, help="leave the third text encoder out")
    parser.add_class_arguments(D3POConfig, as_group=True)
    return parser


def _policy(options: Any) -> PipelinePolicy:
    """Load the model as a run loads it."""
    policy = load_policy(
        options.pretrained_model_name_or_path,
        dtype=AUTOCAST[options.mixed_precision] or torch.float32,
        denoiser_dtype=torch.float32 if options.train_mode == "full" else None,
        device=choose_device(options.device),
        revision=options.revision,
        variant=options.variant,
        drop_text_encoder_3=options.drop_text_encoder_3,
    )
    if options.adapter:
        load_adapter(policy, options.adapter, "sampler")
        policy.adapters.activate("sampler")
    return policy


if __name__ == "__main__":
    sys.exit(run_command(main))
