"""What a training of a scorer is told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from diffalign.bundled import is_bundled
from diffalign.data.bundled import GRADED
from diffalign.data.readers import BUNDLED as BUNDLED_DATA
from diffalign.device import AUTO, choose_device
from diffalign.errors import UserError, unknown
from diffalign.rewards.objective import MarginLoss
from diffalign.rewards.pal import Distance, Place
from diffalign.training.config import OptimOptions

Objective = Literal["pair", "in_batch", "heteroscedastic", "pal"]
Schedule = Literal["constant", "linear", "cosine", "constant_with_warmup"]


@dataclass(frozen=True)
class Budget:
    """How long and how fast a scorer learns.

    Args:
        max_train_steps: optimizer steps.
        batch_size: pairs a step.
        learning_rate: at its height.
        lr_warmup_steps: steps until it is there.
        lr_scheduler: its shape.
    """

    max_train_steps: int
    batch_size: int
    learning_rate: float
    lr_warmup_steps: int
    lr_scheduler: Schedule


PICKSCORE = Budget(4000, 128, 3e-6, 500, "constant_with_warmup")
"""Of the paper, for a ViT-H/14 (arXiv 2305.01569)."""
PAL = replace(PICKSCORE, learning_rate=1e-4)
"""The rate is that of its code."""
BUNDLED = Budget(300, 32, 2e-4, 30, "cosine")
"""Of tiny-pickscore's second step (``train_scripts/world/proxy.py``): minutes for a small model."""


@dataclass(frozen=True)
class RewardTrainingConfig:
    """Options of ``train_reward.py``.

    Args:
        model: the CLIP model to start from, by bundled name, folder or hub name.
        dataset_name: pairs or lists: "bundled", a file or folder, or a hub name.
        objective: "pair", PickScore's; "in_batch", with negatives from the batch; "heteroscedastic", which also learns
            how sure it is; "pal", ideal points of many people on the frozen model.
        output_dir: where the scorer, checkpoints and records go.
        max_train_steps: optimizer steps. 4000, PickScore's paper; 300 for bundled models.
        batch_size: pairs a step. 128, the paper; 32 for bundled models.
        learning_rate: 3e-6, the paper; 2e-4 for bundled models; 1e-4 for "pal", its code. New layers and PAL's points
            learn faster by fixed factors.
        lr_warmup_steps: 500, the paper; 30 for bundled models.
        lr_scheduler: constant_with_warmup; cosine for bundled models.
        weight_decay: decoupled. 0.01: PAL's code for its projectors.
        max_grad_norm: the gradient's norm is clipped to this; 0 for no clipping. 1.0: the package's habit.
        held_out: share of captions that are kept for the accuracy and never trained on.
        checkpointing_steps: steps between checkpoints; 0 for none but the last.
        resume: go on from the last checkpoint in output_dir.
        column_map: canonical column -> column of the source. By default {"scores": "graded"} for the bundled data, the
            exact verifier's: their own scores are those of tiny-pickscore, which could learn nothing from them.
        split: split of a data set with several.
        user_column: column that tells people apart, for "pal"; "annotator" for exports of the labelling app.
        prototypes: points that people's ideals are mixed from. 2: PAL's code.
        place: where ideal points come from, see ``diffalign.rewards.pal``.
        distance: "dist" or "angle". The code pairs distances with the hinge and angles with the cross entropy.
        margin_loss: loss of distances; angles have the cross entropy.
        width: of PAL's common space. 512: its code.
        device: where everything runs; auto is an accelerator where there is one.
        seed: order of the pairs, new weights.
    """

    model: str = "tiny-pickscore"
    dataset_name: str = "bundled"
    objective: Objective = "pair"
    output_dir: Path = Path("runs/reward")
    max_train_steps: int | None = None
    batch_size: int | None = None
    learning_rate: float | None = None
    lr_warmup_steps: int | None = None
    lr_scheduler: Schedule | None = None
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    held_out: float = 0.2
    checkpointing_steps: int = 500
    resume: bool = False
    column_map: Mapping[str, str] | None = None
    split: str = "train"
    user_column: str = "user"
    prototypes: int = 2
    place: Place = "f(P)w"
    distance: Distance = "dist"
    margin_loss: MarginLoss = "hinge"
    width: int = 512
    device: str = AUTO
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in get_args(Objective):
            raise unknown("objective", self.objective, get_args(Objective))
        if self.budget.max_train_steps < 1 or self.budget.batch_size < 1:
            raise UserError("max_train_steps and batch_size must be at least 1")
        if not 0 <= self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}; expected a share from 0 to below 1")

    @property
    def budget(self) -> Budget:
        """What is given, and for what is not what suits objective and model."""
        usual = PAL if self.objective == "pal" else BUNDLED if is_bundled(self.model) else PICKSCORE
        given = {option.name: getattr(self, option.name) for option in fields(Budget)}
        return replace(usual, **{name: value for name, value in given.items() if value is not None})

    @property
    def columns(self) -> Mapping[str, str]:
        """The column map that is given, or what suits the data."""
        if self.column_map is not None:
            return self.column_map
        return {"scores": GRADED} if self.dataset_name == BUNDLED_DATA else {}

    def resolved(self) -> RewardTrainingConfig:
        """Return the options as they are used: nothing is left to choose.

        Raises:
            UserError: for a device that is not here.
        """
        return replace(self, **asdict(self.budget), column_map=self.columns, device=choose_device(self.device))

    @property
    def optim(self) -> OptimOptions:
        """The optimizer's options."""
        return OptimOptions(
            learning_rate=self.budget.learning_rate,
            lr_warmup_steps=self.budget.lr_warmup_steps,
            lr_scheduler=self.budget.lr_scheduler,
            adam_weight_decay=self.weight_decay,
            max_grad_norm=self.max_grad_norm,
        )
