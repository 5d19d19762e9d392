"""Sample images for people to compare: ``python train_scripts/sample_for_labels.py --prompts captions.txt``.

The images, and the table that ``diffalign label serve`` takes, go into ``--output_dir``. After labelling, D3PO learns
from the exported file with the same sampling options; its documentation tells the whole way.
"""

from __future__ import annotations

import sys
from dataclasses import fields
from pathlib import Path

from jsonargparse import ArgumentParser

from diffalign.cli.main import run_command
from diffalign.data.load import load_examples
from diffalign.data.readers import SourceOptions
from diffalign.data.schema import ExampleSet
from diffalign.policies.loading import load_adapter, load_policy
from diffalign.rollouts.labelled import write_samples
from diffalign.strategies.d3po import D3POConfig


def main() -> int:
    """Read options, sample, and say where the images are."""
    parser = ArgumentParser(description="Sample images for people to compare.")
    parser.add_argument("--pretrained_model_name_or_path", type=str, default="tiny-sd", help="the model")
    parser.add_argument("--adapter", type=str | None, default=None, help="folder of an adapter: a later round")
    parser.add_argument("--prompts", type=str, default="bundled", help="captions: a text file, or any data set")
    parser.add_argument("--max_prompts", type=int, default=0, help="use only so many captions; 0 for all")
    parser.add_argument("--output_dir", type=Path, required=True, help="where images and table go")
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other images")
    parser.add_class_arguments(D3POConfig, as_group=True)
    options = parser.parse_args()
    policy = load_policy(options.pretrained_model_name_or_path)
    if options.adapter:
        load_adapter(policy, options.adapter, "sampler")
        policy.adapters.activate("sampler")
    dataset = load_examples(options.prompts, "prompts", SourceOptions(max_samples=options.max_prompts))
    assert isinstance(dataset, ExampleSet)  # nothing is streamed
    captions = [example.prompts[0] for example in dataset.examples]
    config = D3POConfig(**{field.name: getattr(options, field.name) for field in fields(D3POConfig)})
    table = write_samples(policy, captions, config, options.seed, options.output_dir)
    sys.stdout.write(f"{len(captions)} x {config.images_per_prompt} images; next: diffalign label serve {table}\n")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
