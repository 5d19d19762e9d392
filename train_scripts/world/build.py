"""Rebuild the bundled world from nothing: ``python -m train_scripts.world.build --out assets``.

Stages run in order; finished ones are skipped, and one that was stopped continues where it was. On two CPU cores the
whole takes a few hours. ``--effort 0.01`` tries everything in minutes, with worthless weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from train_scripts.world import (
    cards,
    language_model,
    latents,
    measure,
    preferences,
    proxy,
    samples,
    sd,
    sd3,
    turbo,
    vae,
)
from train_scripts.world.workspace import Workspace


@dataclass(frozen=True)
class Stage:
    """One step of the build.

    Args:
        name: what ``--stages`` calls it.
        run: does the work.
    """

    name: str
    run: Callable[[Workspace], object]


STAGES = (
    Stage("vae", vae.train),
    Stage("latents", latents.make),
    Stage("sd", sd.train),
    Stage("sd-first-export", partial(sd.export, stage="sd-first")),
    Stage("proxy", proxy.train_contrastive),
    Stage("proxy-samples", partial(samples.draw, plan=samples.PROXY)),
    Stage("proxy-pairs", proxy.train_pairs),
    Stage("proxy-export", proxy.export),
    Stage("sd-refine", sd.refine),
    Stage("sd-export", sd.export),
    Stage("train-samples", partial(samples.draw, plan=samples.TRAIN)),
    Stage("tune-samples", partial(samples.draw, plan=samples.TUNE)),
    Stage("preferences", preferences.make),
    Stage("language-model", lambda workspace: language_model.build(workspace.out)),
    Stage("sd3", sd3.train),
    Stage("sd3-refine", sd3.refine),
    Stage("sd3-export", sd3.export),
    Stage("turbo-samples", partial(samples.draw, plan=samples.TURBO)),
    Stage("turbo", turbo.train),
    Stage("turbo-export", turbo.export),
    Stage("measure", measure.run),
    Stage("cards", cards.write),
)


def build(workspace: Workspace, names: list[str]) -> None:
    """Run stages; without names all that are not finished."""
    for stage in STAGES:
        done = workspace.cache / f"{stage.name}.done"
        if stage.name in names or (not names and not done.is_file()):
            print(f"stage {stage.name}", flush=True)
            stage.run(workspace)
            done.touch()


def main() -> None:
    """Parse the command line and build."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("assets"), help="folder of the finished assets")
    parser.add_argument("--cache", type=Path, default=Path("build/world"), help="folder of intermediate results")
    parser.add_argument("--stages", nargs="*", default=[], choices=[stage.name for stage in STAGES], metavar="STAGE",
                        help=f"run only these, again: {', '.join(stage.name for stage in STAGES)}")  # fmt: skip
    parser.add_argument("--effort", type=float, default=1.0, help="share of the full number of steps and samples")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    workspace = Workspace(options.out, options.cache, options.effort)
    for folder in (workspace.out, workspace.cache):
        folder.mkdir(parents=True, exist_ok=True)
    build(workspace, options.stages)


if __name__ == "__main__":
    main()
