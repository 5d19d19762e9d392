"""Scoring sampled images: in a thread where asked, with every failure tied to the image that caused it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.errors import RunStopped, UserError
from diffalign.rewards.base import Reward
from diffalign.rewards.identity import networks

OnFailure = Literal["stop", "skip"]


class RewardFailed(RunStopped):
    """A reward raised, or gave no finite number, on an image of a run."""


@dataclass(frozen=True)
class Scored:
    """Rewards of images.

    Args:
        rewards: (rows,) float32; 0 where there is none.
        valid: (rows,) bool, False where the reward failed.
    """

    rewards: Tensor
    valid: Tensor


@dataclass
class RolloutScorer:
    """Scores images and says which one a reward failed on.

    Args:
        reward: the judge.
        folder: where the image of a failure is saved.
        on_failure: "stop" raises; "skip" leaves the image out.
    """

    reward: Reward
    folder: Path
    on_failure: OnFailure = "stop"
    _pool: ThreadPoolExecutor | None = field(default=None, init=False, repr=False)

    def submit(
        self,
        images: Tensor,
        prompts: Sequence[str],
        seeds: Tensor,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Future[Scored]:
        """Score in a thread while sampling goes on; arguments as of :meth:`score`."""
        if self._pool is None:
            place = _place(self.reward, images)
            self._pool = ThreadPoolExecutor(1, initializer=_make_current, initargs=(place,))
        return self._pool.submit(self.score, images, prompts, seeds, metadata)

    @torch.no_grad()
    def score(
        self,
        images: Tensor,
        prompts: Sequence[str],
        seeds: Tensor,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scored:
        """Score a batch.

        Args:
            images: (rows, 3, height, width) in [0, 1].
            prompts, seeds, metadata: one an image.

        Raises:
            RewardFailed: if the reward raised, or gave a number that is not finite, and failures are to stop the run;
                the message names caption, seed and where the image was saved.
        """
        try:
            rewards = self.reward.score(images, prompts, metadata).float()
            problems: dict[int, str] = {}
        except UserError:
            raise  # a mistake in the set-up, not a failure of an image
        except Exception:
            rewards, problems = self._one_by_one(images, prompts, metadata)
        odd = (~rewards.isfinite()).nonzero().flatten().tolist()
        problems = {**{row: f"gave {rewards[row].item()}" for row in odd}, **problems}
        valid = torch.ones(len(rewards), dtype=torch.bool, device=rewards.device)
        for row, problem in problems.items():
            path = self._save(images[row], prompts[row], int(seeds[row]), problem)
            if self.on_failure == "stop":
                raise RewardFailed(
                    f"reward {self.reward.info.name!r} {problem} for {prompts[row]!r} with seed {int(seeds[row])}; the "
                    f"image is {path}: fix the reward, or leave such images out with --on_reward_failure skip"
                )
            valid[row] = False
        return Scored(torch.where(valid, rewards, torch.zeros_like(rewards)), valid)

    def close(self) -> None:
        """End the thread; what waits to be scored is dropped."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _one_by_one(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None
    ) -> tuple[Tensor, dict[int, str]]:
        rewards, problems = torch.zeros(len(images), device=images.device), {}
        for row in range(len(images)):
            here = None if metadata is None else metadata[row : row + 1]
            try:
                rewards[row] = self.reward.score(images[row : row + 1], prompts[row : row + 1], here)[0]
            except Exception as error:
                problems[row] = f"raised {type(error).__name__}: {error}"
        return rewards, problems

    def _save(self, image: Tensor, prompt: str, seed: int, problem: str) -> Path:
        from PIL import Image

        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"seed-{seed}.png"
        pixels = (image.detach().float().nan_to_num().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
        Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(path)
        record = {"prompt": prompt, "seed": seed, "problem": problem}
        path.with_suffix(".json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        return path


def _place(reward: Reward, images: Tensor) -> torch.device:
    """Return the accelerator that a reward works on: its networks', else that of the images it is given."""
    held = (value for network in networks(reward) for value in (*network.parameters(), *network.buffers()))
    return next((value.device for value in held if value.device.type == "cuda"), images.device)


def _make_current(device: torch.device) -> None:
    """Let the thread that calls this work on a device; threads begin on the first one, whatever their process is on."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
