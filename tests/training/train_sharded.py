"""As a program in each of several processes: runs whose network is kept in shards, one after another."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from diffalign.errors import UserError
from diffalign.policies.loading import load_policy
from diffalign.strategies.registry import get_method
from diffalign.training.early_stop import EarlyStop
from diffalign.training.processes import Processes
from diffalign.training.sharding import shard, whole
from diffalign.training.trainables import Trainables
from tests.training.runs import train

GENTLE = {"beta": 100.0, "num_validation_images": 0}  # the usual beta of 2000 makes much of the last bit of an error
FULL = {**GENTLE, "train_mode": "full", "learning_rate": 1e-4, "use_ema": True}
RUNS: dict[str, dict[str, Any]] = {
    # five pairs in steps of four: in every second step one process has none
    "full": {**FULL, "checkpointing_steps": 2},
    "halves": {**FULL, "max_train_steps": 2},
    "lora": {**GENTLE, "max_train_steps": 2, "num_validation_images": 1},
    # inversions are as long as the examples' timesteps ask
    "inpo": {**GENTLE, "method": "inpo", "max_train_steps": 1, "num_inversion_steps": 4},
    "bf16": {
        "method": "sft",
        "train_mode": "full",
        "mixed_precision": "bf16",
        "gradient_checkpointing": True,
        "max_train_steps": 1,
        "num_validation_images": 0,
    },
    "watched": {
        **GENTLE,
        "max_train_steps": 2,
        "num_validation_images": 2,
        "validation_prompts": ["a cat", "a dog", "a cow"],
        "validation_steps": 1,
        "early_stop_reward": "incompressibility",
    },
    "kto": {**GENTLE, "method": "diffusion_kto", "max_train_steps": 2, "max_rows_per_forward": 1},
    "ruined": {**GENTLE, "learning_rate": 1e30},
    "ddpo": {"method": "ddpo", "rewards": "pickscore"},
    "pinned": {"pinned_draws": 1},
    "adafactor": {"optimizer": "adafactor"},
    "fp16": {"mixed_precision": "fp16"},
}


def share_of_this_process(model: str) -> float:
    """Return the share of a network's weights that this process keeps."""
    network, processes = load_policy(model).module, Processes(may_shard=True)
    shard([network], processes.device, processes.shards)
    parts = [p.to_local().numel() for p in network.parameters() if isinstance(p, DTensor)]
    return sum(parts) / sum(p.numel() for p in network.parameters())


def best_comes_back(model: str) -> bool:
    """Say whether an early stop gives back the weights of its best moment, also to another one, and not for good."""
    policy, processes = load_policy(model), Processes(may_shard=True)
    policy.train_weights()
    shard([policy.module], processes.device, processes.shards)
    trained = Trainables(get_method("sft").strategy(get_method("sft").strategy.Config()), policy)
    first, second = EarlyStop(trained, 1), EarlyStop(trained, 1)
    best = whole(trained.state_dict())
    first.look(0, 1.0)
    with torch.no_grad():
        for parameter in trained.parameters:
            parameter.mul_(2)
    first.look(1, 0.5)
    second.load_state_dict(whole(first.state_dict()))

    def held() -> bool:
        return all(torch.equal(value, best[name]) for name, value in whole(trained.state_dict()).items())

    found = []
    for stop in (first, second):
        with stop.best():
            found.append(held())
    after = whole(trained.state_dict())
    return all(found) and all(torch.equal(value, 2 * best[name]) for name, value in after.items())


def main(model: str, pairs: str, folder: Path) -> None:
    """Make all runs; what each was refused for, or ended with, goes to ``FOLDER/RANK.json``."""
    messages: dict[str, Any] = {"share": share_of_this_process(model), "best": best_comes_back(model)}

    def run(name: str, **changes: Any) -> None:
        try:
            train(pairs, model, folder / name, **{**RUNS[name], **changes})
        except UserError as error:
            messages[name] = str(error)

    for name in RUNS:
        run(name)
    run("halves", max_train_steps=4, resume_from_checkpoint="latest")
    (folder / f"{os.environ['RANK']}.json").write_text(json.dumps(messages))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
