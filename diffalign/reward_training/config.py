"""What a training of a scorer is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from diffalign.errors import UserError, unknown
from diffalign.rewards.objective import MarginLoss
from diffalign.rewards.pal import Distance, Place
from diffalign.training.config import OptimOptions

Objective = Literal["pair", "in_batch", "heteroscedastic", "pal"]


@dataclass(frozen=True)
class RewardTrainingConfig:
    """Options of ``train_reward.py``.

    Args:
        model: the CLIP model to start from, by bundled name, folder or hub name.
        dataset_name: pairs or lists: "bundled", a file or folder, or a hub name.
        objective: "pair", PickScore's; "in_batch", with negatives from the batch; "heteroscedastic", which also learns
            how sure it is; "pal", ideal points of many people on the frozen model.
        output_dir: where the scorer, checkpoints and records go.
        max_train_steps: optimizer steps. 4000: PickScore's paper (arXiv 2305.01569).
        batch_size: pairs a step. 128: the paper.
        learning_rate: by default 3e-6 (the paper), or 1e-4 for "pal" (its code). New layers and PAL's points learn
            faster by fixed factors.
        lr_warmup_steps: 500: the paper.
        weight_decay: decoupled. 0.01: PAL's code for its projectors.
        max_grad_norm: the gradient's norm is clipped to this; 0 for no clipping. 1.0: the package's habit.
        held_out: share of captions that are kept for the accuracy and never trained on.
        checkpointing_steps: steps between checkpoints; 0 for none but the last.
        resume: go on from the last checkpoint in output_dir.
        column_map: canonical column -> column of the source.
        split: split of a data set with several.
        user_column: column that tells people apart, for "pal"; "annotator" for exports of the labelling app.
        prototypes: points that people's ideals are mixed from. 2: PAL's code.
        place: where ideal points come from, see ``diffalign.rewards.pal``.
        distance: "dist" or "angle". The code pairs distances with the hinge and angles with the cross entropy.
        margin_loss: loss of distances; angles have the cross entropy.
        width: of PAL's common space. 512: its code.
        device: where everything runs.
        seed: order of the pairs, new weights.
    """

    model: str = "tiny-pickscore"
    dataset_name: str = "bundled"
    objective: Objective = "pair"
    output_dir: Path = Path("runs/reward")
    max_train_steps: int = 4000
    batch_size: int = 128
    learning_rate: float | None = None
    lr_warmup_steps: int = 500
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    held_out: float = 0.1
    checkpointing_steps: int = 500
    resume: bool = False
    column_map: Mapping[str, str] = field(default_factory=dict)
    split: str = "train"
    user_column: str = "user"
    prototypes: int = 2
    place: Place = "f(P)w"
    distance: Distance = "dist"
    margin_loss: MarginLoss = "hinge"
    width: int = 512
    device: str = "cpu"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise unknown("objective", self.objective, get_args(Objective))
        if self.max_train_steps < 1 or self.batch_size < 1:
            raise UserError("max_train_steps and batch_size must be at least 1")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}; expected a share from 0 to below 1")

    @property
    def rate(self) -> float:
        """The learning rate that is used."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 1e-4 if self.objective == "pal" else 3e-6

    @property
    def optim(self) -> OptimOptions:
        """The optimizer's options."""
        return OptimOptions(
            learning_rate=self.rate,
            lr_warmup_steps=self.lr_warmup_steps,
            adam_weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )
