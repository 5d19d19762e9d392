"""The loop that trains a scorer: small, repeatable, and resumed to the bit."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffalign.data.readers import SourceOptions
from diffalign.errors import UserError
from diffalign.evaluation.winrate import Estimate, bootstrap_mean
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
class HeldOutAccuracy:
    """Share of preferences that the scores agree with, on captions that were not trained on.

    Captions count alike, equal scores half; ties are no preferences and left out. Intervals are at 95 %, over captions.

    Args:
        pairs, captions: how many there are.
        before, after: the accuracy.
        gain: mean of the paired differences.
    """

    pairs: int
    captions: int
    before: Estimate
    after: Estimate
    gain: Estimate

    def lines(self) -> list[str]:
        """Return a table as lines of text."""
        return [
            f"accuracy on {self.pairs} decided pairs of {self.captions} held-out captions, "
            "95 % intervals over captions",
            f"before  {self.before}",
            f"after   {self.after}",
            f"gain   {self.gain.shown('+')}",
        ]


@dataclass(frozen=True)
class RewardTrainingResult:
    """What a training gave.

    Args:
        folder: of the scorer; ``NAME@FOLDER``, or the folder alone for a CLIP model.
        pairs: how many were trained on.
        held_out: how well the scorer does on the others; None without any.
        loss: of the last step.
    """

    folder: Path
    pairs: int
    held_out: HeldOutAccuracy | None
    loss: float


def train_reward(config: RewardTrainingConfig) -> RewardTrainingResult:
    """Train a preference scorer.

    Args:
        config: the options.

    Raises:
        UserError: for data, models or options that will not do, and for a folder that holds another run.
    """
    config = config.resolved()
    torch.manual_seed(config.seed)
    options = SourceOptions(split=config.split, column_map=config.columns)
    trained, kept_back = split_captions(read_pairs(config.dataset_name, options, config.user_column), config.held_out)
    kept_back = [pair for pair in kept_back if not pair.tied]  # of a tie no score is right or wrong
    scorer = PickScore.load(config.model, device=config.device)
    objective = build_objective(scorer, config, [*trained, *kept_back])
    folder = RunFolder(config.output_dir)
    if not config.resume and list_checkpoints(folder.checkpoints):
        raise UserError(f"{folder.path} holds a run already; choose another --output_dir, or go on with --resume true")
    folder.record(_plain(config))
    named = "".join(f"; {name} from column {own}" for name, own in config.columns.items())
    ties = sum(pair.tied for pair in trained)
    sys.stdout.write(f"{len(trained)} pairs to train on, {ties} of them ties; {len(kept_back)} held out{named}\n")
    before = _accuracies(objective, kept_back) if kept_back else None
    if before is not None and bool((before == 1).all()):
        sys.stdout.write(
            f"note: {config.model} orders all {len(kept_back)} held-out pairs right before any training: it was fitted "
            "to such pairs, or they were labelled by it, and little is left to learn; --model names another start\n"
        )
    loss = _optimise(objective, trained, config, folder)
    held_out = None
    if before is not None:
        after = _accuracies(objective, kept_back)
        estimates = (bootstrap_mean(values[None]) for values in (before, after, after - before))
        held_out = HeldOutAccuracy(len(kept_back), len(before), *estimates)
    objective.save(folder.path)
    result = RewardTrainingResult(folder.path, len(trained), held_out, loss)
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
    total, highest = config.budget.max_train_steps, config.budget.learning_rate
    log = JsonLines(folder.path / METRICS_FILE, resumed_from=start)
    for step in range(start, total):
        batch = draw_batch(pairs, step, config.budget.batch_size, config.seed)
        rate = highest * learning_rate_factor(step, total, config.optim)
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
        last = step + 1 == total
        if last or (step + 1) % max(1, total // 10) == 0:
            sys.stdout.write(f"step {step + 1} of {total}: loss {loss:.4f}, accuracy {accuracy:.3f}\n")
            sys.stdout.flush()
        if last or (config.checkpointing_steps and (step + 1) % config.checkpointing_steps == 0):
            state = {"optimizer": optimizer.state_dict(), "loss": loss, "config": _plain(config)}
            save_checkpoint(folder.checkpoints, step + 1, objective.trained.state_dict(), state, _KEPT)
    log.close()
    return loss


def _plain(config: RewardTrainingConfig) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(json.dumps(asdict(config), default=str))
    return plain


def _check_same(saved: Mapping[str, Any], config: RewardTrainingConfig, where: Path) -> None:
    falls = config.budget.lr_scheduler in ("linear", "cosine")  # towards 0 at the last step: it is part of the curve
    free = _FREE - {"max_train_steps"} if falls else _FREE
    for name, value in _plain(config).items():
        if name not in free and saved.get(name) != value:
            raise UserError(
                f"cannot resume from {where}: its {name} is {saved.get(name)!r}, this run's is {value!r}; give the "
                "same options, or start a new run"
            )


@torch.no_grad()
def _accuracies(objective: ScorerObjective, pairs: Sequence[ScorerPair]) -> Tensor:
    """Share of each held-out caption's preferences that the scores agree with, (captions,); equal scores count half."""
    size = objective.config.budget.batch_size
    batches = [pairs[start : start + size] for start in range(0, len(pairs), size)]
    right = torch.cat([label_mass(objective.scores(batch), objective.labels(batch)) for batch in batches]).cpu()
    captions = list(dict.fromkeys(pair.prompt for pair in pairs))
    rows = {caption: [row for row, pair in enumerate(pairs) if pair.prompt == caption] for caption in captions}
    return torch.stack([right[index].mean() for index in rows.values()])
