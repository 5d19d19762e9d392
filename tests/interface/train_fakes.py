"""Train fakes through the loop; as a program, all of them in each of several processes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from torch import Tensor

from diffalign.strategies.base import Context
from diffalign.training.checkpoint import RunIdentity
from diffalign.training.config import OptimOptions, RunOptions
from diffalign.training.loop import RunRecord, Trainer
from diffalign.training.processes import Processes
from tests.interface.fakes import LEARNING_RATE, UPDATES
from tests.interface.run_fakes import FAKES, TrainsNoise
from tests.interface.toy import ToyPolicy, ToySource


def train_fake(name: str, folder: Path, micro: int) -> dict[str, Tensor]:
    """Run a fake over one epoch of plain gradient descent and return its vectors."""
    processes = Processes()
    strategy = FAKES[name]()
    ctx = Context(
        policy=ToyPolicy(),
        rewards={"sum": lambda x: x.sum(dim=1)},
        frozen_policies={"margin": ToyPolicy()},
        reduce=processes.sum,
        total_steps=4 if name == "Rollout" else len(UPDATES),
        rank=processes.rank,
        world_size=processes.world_size,
    )
    strategy.build(ctx)
    own = strategy.spec.trains == "own"
    trainer = Trainer(
        strategy,
        ctx,
        ToySource(micro=micro, rank=processes.rank, world_size=processes.world_size),
        processes,
        optim=OptimOptions(optimizer="sgd", max_grad_norm=TrainsNoise.clip if own else 0.0),
        run=RunOptions(guard_patience=100),
        learning_rate=LEARNING_RATE,
        folder=folder / "run",
        record=RunRecord(RunIdentity(name, "toy", "lora", 0, ""), {"method": name}),
    )
    trainer.fit()
    vectors = {key: value.detach() for key, value in ctx.policy.module.vectors.items()}
    return {**vectors, "own": strategy.noise.detach()} if own else vectors  # type: ignore[attr-defined]


if __name__ == "__main__":
    for fake in FAKES:
        target = Path(sys.argv[1])
        vectors = train_fake(fake, target / fake, micro=1)
        content = {key: value.tolist() for key, value in vectors.items()}
        (target / f"{fake}-{Processes().rank}.json").write_text(json.dumps(content))
