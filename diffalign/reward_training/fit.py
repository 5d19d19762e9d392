"""The loop that trains a scorer: small, repeatable, and resumed to the bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from diffalign.data.readers import SourceOptions
from diffalign.errors import UserError
from diffalign.reward_training.config import RewardTrainingConfig
from diffalign.reward_training.objectives import ScorerObjective, build_objective
from diffalign.reward_training.pairs import ScorerPair, draw_batch, read_pairs, split_captions
from diffalign.rewards.pickscore import PickScore
from diffalign.rewards.ranking import label_mass
from diffalign.training.checkpoint import find_checkpoint, list_checkpoints, save_checkpoint
from diffalign.training.optim import build_optimizer, clip_gradients, learning_rate_factor
from diffalign.training.runfolder import RunFolder
from diffalign.training.trackers import METRICS_FILE, JsonLines

_KEPT = 2
"""Checkpoints that stay."""
_FREE = frozenset({"output_dir", "max_train_steps", "checkpointing_steps", "resume", "device"})
"""Options that may change when a run goes on."""


@dataclass(frozen=True)
class RewardTrainingResult:
    """What a training gave.

    Args:
        folder: of the scorer; ``NAME@FOLDER``, or the folder alone for a CLIP model.
        pairs, held_out_pairs: how many pairs were trained on, and how many were kept back.
        accuracy_before, accuracy_after: share of held-out preferences that the scores agree with; None without any.
        loss: of the last step.
    """

    folder: Path
    pairs: int
    held_out_pairs: int
    accuracy_before: float | None
    accuracy_after: float | None
    loss: float


def train_reward(config: RewardTrainingConfig) -> RewardTrainingResult:
    """Train a preference scorer.

    Args:
        config: the options.

    Raises:
        UserError: for data, models or options that will not do, and for a folder that holds another run.
    """
    torch.manual_seed(config.seed)
    options = SourceOptions(split=config.split, column_map=config.column_map)
    trained, kept_back = split_captions(read_pairs(config.dataset_name, options, config.user_column), config.held_out)
    scorer = PickScore.load(config.model, device=config.device)
    objective = build_objective(scorer, config, [*trained, *kept_back])
    folder = RunFolder(config.output_dir)
    if not config.resume and list_checkpoints(folder.checkpoints):
        raise UserError(f"{folder.path} holds a run already; choose another --output_dir, or go on with --resume true")
    folder.record(_plain(config))
    before = _accuracy(objective, kept_back, config.batch_size)
    loss = _optimise(objective, trained, config, folder)
    after = _accuracy(objective, kept_back, config.batch_size)
    objective.save(folder.path)
    result = RewardTrainingResult(folder.path, len(trained), len(kept_back), before, after, loss)
    summary = json.dumps({**asdict(result), "folder": str(folder.path)}, indent=1)
    (folder.path / "summary.json").write_text(summary + "\n", encoding="utf-8")
    return result


def _optimise(
    objective: ScorerObjective, pairs: Sequence[ScorerPair], config: RewardTrainingConfig, folder: RunFolder
) -> float:
    """Take the steps that are left; return the last loss."""
    groups = objective.groups()
    optimizer = build_optimizer(groups, config.optim, torch.device(config.device))
    start, loss = 0, float("nan")
    if config.resume:
        checkpoint, _ = find_checkpoint("latest", folder.checkpoints)
        _check_same(checkpoint.state["config"], config, checkpoint.folder)
        start, loss = checkpoint.step, float(checkpoint.state["loss"])
        objective.trained.load_state_dict(checkpoint.weights)
        moments = checkpoint.state["optimizer"]
        optimizer.load_state_dict({**moments, "state": {int(k): v for k, v in moments["state"].items()}})
    log = JsonLines(folder.path / METRICS_FILE, resumed_from=start)
    for step in range(start, config.max_train_steps):
        batch = draw_batch(pairs, step, config.batch_size, config.seed)
        rate = config.rate * learning_rate_factor(step, config.max_train_steps, config.optim)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["lr_scale"]
        value, scores = objective.loss(batch)
        if not value.isfinite():
            raise UserError(
                f"the loss is {value.item()} at step {step + 1}: lower --learning_rate; the last checkpoint is in "
                f"{folder.checkpoints}"
            )
        value.backward()
        norm = clip_gradients(groups, config.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss = value.item()
        accuracy = label_mass(scores.detach(), objective.labels(batch)).mean().item()
        log.log(step + 1, {"loss": loss, "accuracy": accuracy, "grad_norm": norm.item(), "learning_rate": rate})
        last = step + 1 == config.max_train_steps
        if last or (config.checkpointing_steps and (step + 1) % config.checkpointing_steps == 0):
            state = {"optimizer": optimizer.state_dict(), "loss": loss, "config": _plain(config)}
            save_checkpoint(folder.checkpoints, step + 1, objective.trained.state_dict(), state, _KEPT)
            sys.stdout.write(f"step {step + 1} of {config.max_train_steps}: loss {loss:.4f}, accuracy {accuracy:.3f}\n")
    log.close()
    return loss


def _plain(config: RewardTrainingConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return plain


def _check_same(saved: Mapping[str, Any], config: RewardTrainingConfig, where: Path) -> None:
    for name, value in _plain(config).items():
        if name not in _FREE and saved.get(name) != value:
            raise UserError(
                f"cannot resume from {where}: its {name} is {saved.get(name)!r}, this run's is {value!r}; give the "
                "same options, or start a new run"
            )


@torch.no_grad()
def _accuracy(objective: ScorerObjective, pairs: Sequence[ScorerPair], batch_size: int) -> float | None:
    """Share of held-out preferences that the scores agree with; ties count half."""
    if not pairs:
        return None
    batches = [pairs[start : start + batch_size] for start in range(0, len(pairs), batch_size)]
    right = torch.cat([label_mass(objective.scores(batch), objective.labels(batch)) for batch in batches])
    return right.mean().item()
