"""From a rollout to updates: which images share an optimizer step, and which of their steps are trained.

Who goes into which update is decided by the seeds of all images, so it does not depend on the number of processes.
Steps without an advantage may be left out; they still count in what the loss is divided by.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from diffalign.diffusion.random import derive_seed, row_generators
from diffalign.rollouts.rollout import Rollout, RolloutConfig
from diffalign.rollouts.transitions import RecordedSteps, TransitionBatch, joined_ids, rows_per_pass
from diffalign.strategies.base import Context, Update


def assign(units: Tensor, parts: int, epoch: int) -> Tensor:
    """Share units out over the updates of an inner epoch, (n,) int64 in 0 .. parts - 1, as evenly as possible.

    Args:
        units: (n,) int64 seeds of the units of all processes, all different.
        parts: number of updates.
        epoch: another epoch shares out differently.
    """
    keys = torch.tensor([derive_seed(unit, "update", epoch) for unit in units.tolist()], dtype=torch.long)
    return keys.argsort().argsort() * parts // max(1, len(units))


def trained_steps(seeds: Tensor, config: RolloutConfig, steps: int, epoch: int = 0) -> Tensor:
    """Return the steps that each image is trained on, (rows, S) int64, ascending.

    Args:
        seeds: (rows,) of the images.
        config: which share of the steps, and whether the last one counts.
        steps: moves of the sampler.
        epoch: inner epoch; another one draws other steps where not all are trained.
    """
    eligible = steps if config.train_last_step or steps == 1 else steps - 1
    count = max(1, int(eligible * config.trained_share))
    if count == eligible or config.trained_steps == "first":
        return torch.arange(count).expand(len(seeds), -1)
    drawn = [torch.randperm(eligible, generator=g)[:count] for g in row_generators(seeds, f"trained steps {epoch}")]
    return torch.stack(drawn).sort(dim=1).values if drawn else torch.zeros(0, count, dtype=torch.long)


def image_updates(
    ctx: Context,
    rollout: Rollout,
    config: RolloutConfig,
    fields: Mapping[str, Tensor],
    figures: Mapping[str, float],
    active: Tensor | None = None,
) -> Iterator[Update]:
    """Yield the updates of a rollout, images being independent of each other.

    Args:
        ctx: the run.
        rollout: the images.
        config: how many updates, and which steps.
        fields: name -> (n,) one number for each image of all processes; each of its transitions carries it.
        figures: what to report of the rollout.
        active: (n,) bool, images that contribute a gradient; the others only count. All by default.
    """
    judged = rollout.judged
    active = torch.ones_like(judged.valid) if active is None else active
    figures = {**figures, "active_images": float((active & judged.valid).float().mean())}
    for epoch in range(config.inner_epochs):
        place = torch.full_like(judged.seeds, -1)
        place[judged.valid] = assign(judged.seeds[judged.valid], config.updates_per_rollout, epoch)
        for part in range(config.updates_per_rollout):
            mine = (place[judged.own] == part).nonzero().flatten()
            if rollout.trajectories is None or not len(mine):
                yield Update([], weight=0.0)
                continue
            steps = trained_steps(rollout.trajectories.seeds, config, rollout.trajectories.log_probs.shape[1], epoch)
            # where nobody is active everybody is replayed: an update must be able to report its rollout
            rows = mine[active[judged.own[mine]]] if active[place == part].any() else mine
            batches = transition_batches(ctx, rollout, config, rows, steps[rows], fields, figures)
            yield Update(list(batches), weight=float(len(mine) * steps.shape[1]))


def transition_batches(
    ctx: Context,
    rollout: Rollout,
    config: RolloutConfig,
    rows: Tensor,
    steps: Tensor,
    fields: Mapping[str, Tensor],
    figures: Mapping[str, float],
) -> Iterator[TransitionBatch]:
    """Yield micro-batches of steps, one example a transition.

    Args:
        ctx, rollout, config: as of :func:`image_updates`.
        rows: (m,) int64 images of this process.
        steps: (m, S) int64 their steps.
        fields, figures: as of :func:`image_updates`.
    """
    assert rollout.trajectories is not None
    sampler = config.sampler(ctx.policy.process)
    images, moves = rows[:, None].expand_as(steps).flatten(), steps.flatten()
    size = rows_per_pass(ctx, config)
    for start in range(0, len(images), size):
        image, move = images[start : start + size], moves[start : start + size]
        place = rollout.judged.own[image]
        carried = {name: value[place].to(ctx.device) for name, value in fields.items()}
        yield TransitionBatch(
            ids=joined_ids(rollout.ids, image, move),
            seeds=rollout.trajectories.seeds[image],
            fields={**carried, "extent": sampler.extent(move).to(ctx.device)},
            transitions=RecordedSteps(rollout.trajectories, image, move),
            figures=figures,
        )


def group_rows(rollout: Rollout) -> Tensor:
    """Return the images of each caption of this process, (B, images) int64 rows."""
    count = len(rollout.ids)
    images = len(rollout.judged.own) // count if count else 0
    return torch.arange(images * count).reshape(images, count).T


def group_parts(rollout: Rollout, config: RolloutConfig) -> Iterator[tuple[int, Tensor]]:
    """Yield, for each update, its inner epoch and the captions of this process that belong to it, (b,) int64.

    For methods that compare the images of a caption: a group is never divided.
    """
    seeds = rollout.judged.groups.unique()
    rows = group_rows(rollout)
    mine = rollout.judged.groups[rollout.judged.own[rows[:, 0]]] if len(rows) else seeds[:0]
    at = torch.searchsorted(seeds, mine)
    for epoch in range(config.inner_epochs):
        place = assign(seeds, config.updates_per_rollout, epoch)[at]
        for part in range(config.updates_per_rollout):
            yield epoch, (place == part).nonzero().flatten()
