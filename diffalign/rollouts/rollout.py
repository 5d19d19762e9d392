"""Rollouts: images that a policy samples for a batch of captions, judged while sampling goes on.

The images of a caption stay on one process, so a group is whole whatever the number of processes; what a method must
know of all images is exchanged once a rollout, in an order that does not depend on that number either. Rows are in
block order: the first image of every caption of this process, then the second, ...
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from diffalign.batch import Condition, ImageBatch
from diffalign.diffusion.base import NoiseProcess
from diffalign.diffusion.random import derive_seed
from diffalign.errors import RunStopped, UserError, require_at_least
from diffalign.rewards.base import added_shares
from diffalign.rewards.combine import Normalised
from diffalign.rollouts.judged import Judged, exchange
from diffalign.rollouts.scoring import RewardFailed, RolloutScorer, Scored
from diffalign.rollouts.steps import NoiseSchedule, StochasticSteps
from diffalign.rollouts.trajectory import Storage, Trajectories, image_seeds, roll_out
from diffalign.strategies.base import Context


@dataclass(frozen=True)
class RolloutConfig:
    """How images are sampled, and how a rollout becomes updates.

    Args:
        images_per_prompt: images of a caption in a rollout, its group.
        rollout_steps: sampling steps. 50: official code of DDPO.
        rollout_guidance_scale: guidance in sampling and in training; 1 switches it off. 5: official code of DDPO.
        rollout_batch_size: images sampled at once; the images of a caption are judged at once, however many.
        eta: share of DDIM's randomness, in (0, 1]. 1: official code of DDPO.
        noise_level: scale of the noise that makes a flow model's sampler stochastic. 0.7: paper of Flow-GRPO (DanceGRPO
            0.3).
        noise_schedule: that noise grows with the noise in the image, or is constant. "growing": Flow-GRPO ("constant":
            DanceGRPO).
        same_start: the images of a caption share their initial noise. False: DDPO, Flow-GRPO.
        trained_share: share of the steps that are trained. 1: official code of DDPO.
        trained_steps: which those are: drawn for each image, or the first ones, where what an image shows is decided.
            "drawn": official code of DDPO ("first": MixGRPO, arXiv 2507.21802).
        train_last_step: train the step that ends at the image, too. True: official code of DDPO.
        updates_per_rollout: optimizer steps that share the images of a rollout. 2: official configs of DDPO.
        inner_epochs: passes over a rollout. 1: official code of DDPO.
        transitions_per_pass: steps of images in one forward pass with a graph.
        latents_dtype: type in which trajectories are kept; sampling continues from what is kept.
        latents_device: where trajectories wait, "same" or "cpu".
    """

    images_per_prompt: int = 8
    rollout_steps: int = 50
    rollout_guidance_scale: float = 5.0
    rollout_batch_size: int = 32
    eta: float = 1.0
    noise_level: float = 0.7
    noise_schedule: NoiseSchedule = "growing"
    same_start: bool = False
    trained_share: float = 1.0
    trained_steps: Literal["drawn", "first"] = "drawn"
    train_last_step: bool = True
    updates_per_rollout: int = 2
    inner_epochs: int = 1
    transitions_per_pass: int = 32
    latents_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    latents_device: Literal["same", "cpu"] = "same"

    def __post_init__(self) -> None:
        require_at_least(1, self, *(f.name for f in fields(RolloutConfig) if f.type in ("int", int)))
        if not 0 < self.trained_share <= 1:
            raise UserError(f"trained_share is {self.trained_share}: expected a number in (0, 1]")
        if self.rollout_steps == 1 and not self.train_last_step:
            raise UserError("rollout_steps is 1 and train_last_step is off: no step would be trained")

    def require_groups(self) -> None:
        """Refuse groups of one image, for methods that compare the images of a caption.

        Raises:
            UserError: saying why.
        """
        if self.images_per_prompt < 2:
            raise UserError("images_per_prompt is 1: the images of a caption are compared, which takes 2 at least")

    @property
    def kept_dtype(self) -> torch.dtype:
        """Type in which trajectories are kept."""
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[self.latents_dtype]

    def sampler(self, process: NoiseProcess) -> StochasticSteps:
        """Return the sampler for a noise process."""
        return StochasticSteps(process, self.rollout_steps, self.eta, self.noise_level, self.noise_schedule)


@dataclass(frozen=True)
class Rollout:
    """The images of this process, in block order, and what is known of all.

    Args:
        trajectories: of the images; None on a process without captions.
        ids: one name a caption.
        judged: rewards of all processes.
        names: of the rewards.
        weights: factor of each reward in their sum.
        shares: what the rewards report besides their numbers, over all processes so far.
    """

    trajectories: Trajectories | None
    ids: Sequence[str]
    judged: Judged
    names: tuple[str, ...]
    weights: tuple[float, ...]
    shares: Mapping[str, float] = field(default_factory=dict)

    @property
    def rewards(self) -> Tensor:
        """(n,) weighted sum of the rewards of all images of all processes."""
        return self.judged.rewards @ torch.tensor(self.weights, device=self.judged.rewards.device)

    def figures(self) -> dict[str, float]:
        """What to watch of a rollout, over all processes; see ``strategies.metrics``."""
        judged, total = self.judged, self.rewards
        kept = total[judged.valid]
        _, index = judged.groups[judged.valid].unique(return_inverse=True)
        spread = total.new_zeros(int(index.max()) + 1)
        low = spread.scatter_reduce(0, index, kept, "amin", include_self=False)
        high = spread.scatter_reduce(0, index, kept, "amax", include_self=False)
        parts = judged.rewards[judged.valid].mean(0).tolist() if len(self.names) > 1 else []
        return {
            "reward": float(kept.mean()),
            "reward_std": float(kept.std(correction=0)),
            "flat_groups": float((low == high).float().mean()),
            "failed_images": float((~judged.valid).sum()),
            **self.shares,
            **{f"reward/{name}": value for name, value in zip(self.names, parts, strict=False)},
        }


class Rollouts:
    """Samples and judges; made with the strategy, opened when the run's context exists.

    Args:
        config: how.
        keep_means: record the means of all transitions.
    """

    def __init__(self, config: RolloutConfig, keep_means: bool = False) -> None:
        self._config = config
        waits = torch.device("cpu") if config.latents_device == "cpu" else None
        self._storage = Storage(config.kept_dtype, waits, keep_means)
        self._running: Mapping[str, Normalised] = {}
        self._scorers: list[RolloutScorer] = []

    def open(self, ctx: Context) -> None:
        """Start a scorer for each reward, with a thread of its own: what is judged need not wait for sampling.

        Raises:
            UserError: if the run has no reward, or the sampler does not fit the process.
        """
        if not ctx.rewards:
            raise UserError("a rollout needs a reward: name one or more with --rewards")
        self._config.sampler(ctx.policy.process)
        on_failure: Literal["stop", "skip"] = "skip" if ctx.skip_failed_rewards else "stop"
        self._running = {name: r for name, r in ctx.rewards.items() if isinstance(r, Normalised)}
        judges = [r.reward if isinstance(r, Normalised) else r for r in ctx.rewards.values()]
        self._scorers = [RolloutScorer(judge, ctx.folder / "failures", on_failure) for judge in judges]

    def __call__(self, ctx: Context, batches: Sequence[ImageBatch], known: Tensor | None = None) -> Rollout:
        """Sample ``images_per_prompt`` images of every caption and judge them; all processes together.

        Args:
            ctx: the policy samples, in eval mode and without gradient.
            batches: captions of this process, maybe none.
            known: (rows, 1) rewards in block order, where these images have been judged before: nothing is scored then.

        Raises:
            RunStopped: on every process, if a reward fails on any of them and failures are to end the run
                (:class:`RewardFailed` where it failed), or fails on every image.
        """
        trajectories, rewards, valid = self._sample_together(ctx, batches, known is None)
        example_seeds = torch.cat([b.seeds for b in batches]) if batches else torch.zeros(0, dtype=torch.long)
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        captions = torch.tensor([derive_seed("caption", prompt) for prompt in prompts], dtype=torch.long)
        images = self._config.images_per_prompt
        seeds = trajectories.seeds if trajectories is not None else example_seeds
        if known is not None:
            rewards, valid = known, known.isfinite().all(1)
        numbers = torch.stack([seeds, example_seeds.repeat(images), captions.repeat(images), valid.long()], dim=1)
        judged = exchange(ctx, numbers, rewards)
        if not bool(judged.valid.any()):
            raise RewardFailed(
                f"no image of the rollout could be judged ({len(judged.valid)} failed): the reward itself does not work"
            )
        if known is None:
            self._normalise(judged.rewards, judged.valid, tuple(ctx.rewards))
        return Rollout(
            trajectories,
            [name for batch in batches for name in batch.ids],
            judged,
            tuple(ctx.rewards) if known is None else ("labels",),
            tuple(ctx.reward.weights.values()) if known is None else (1.0,),
            self._shares(ctx),
        )

    def _shares(self, ctx: Context) -> dict[str, float]:
        """What rewards report besides their numbers, over all processes."""
        counts = added_shares(scorer.reward for scorer in self._scorers)
        if not counts:
            return {}
        table = ctx.reduce(torch.tensor(list(counts.values()), dtype=torch.float32, device=ctx.device)).tolist()
        return {name: part / max(1.0, whole) for name, (part, whole) in zip(counts, table, strict=True)}

    def _sample_together(
        self, ctx: Context, batches: Sequence[ImageBatch], judge: bool
    ) -> tuple[Trajectories | None, Tensor, Tensor]:
        """Sample this process's share, if it has one; where any process fails, all raise, so that none waits for it."""
        failure: UserError | None = None
        empty = torch.zeros(0, len(self._scorers)), torch.zeros(0, dtype=torch.bool)
        sampled: tuple[Trajectories | None, Tensor, Tensor] = (None, *empty)
        if batches:
            try:
                sampled = self._sample(ctx, batches, judge)
            except UserError as error:
                failure = error
        failures = ctx.reduce(torch.tensor([float(failure is not None)], device=ctx.device))
        if isinstance(failure, RunStopped):
            raise failure
        if failure is not None:
            raise RunStopped(str(failure)) from failure
        if bool(failures):
            raise RunStopped("sampling or a reward failed on another process, which says why")
        return sampled

    def _sample(self, ctx: Context, batches: Sequence[ImageBatch], judge: bool) -> tuple[Trajectories, Tensor, Tensor]:
        """Return trajectories, rewards (rows, R) and where they are valid (rows,), in block order.

        The images of a caption are judged together: duels and fronts within a caption are rewards, too.
        """
        config = self._config
        condition = Condition.cat([batch.condition for batch in batches])
        examples, images = len(condition), config.images_per_prompt
        starts = torch.cat([batch.seeds for batch in batches])
        seeds = image_seeds(starts, images)
        prompts = [prompt for batch in batches for prompt in batch.prompts]
        metadata = [row for batch in batches for row in batch.metadata]
        steps, shape = config.sampler(ctx.policy.process), tuple(batches[0].latents.shape[1:])
        parts: list[Trajectories] = []
        pending: list[list[Future[Scored]]] = []
        blocks = _whole_groups(examples, images, config.rollout_batch_size)
        for block in blocks:
            pictures = []
            for rows in block.split(config.rollout_batch_size):
                of = rows % examples
                part = roll_out(
                    ctx.policy, steps, condition.select(of.to(ctx.device)), seeds[rows], shape,
                    guidance_scale=config.rollout_guidance_scale,
                    start_seeds=starts[of] if config.same_start else None,
                    storage=self._storage,
                )  # fmt: skip
                parts.append(part)
                ctx.progress.images += len(part)
                if judge:
                    with torch.no_grad():
                        pictures.append(ctx.policy.decode(part.final))
                ctx.progress.show("rollout", sum(map(len, parts)), len(seeds))
            if judge:
                of_block = (block % examples).tolist()
                captions = [prompts[index] for index in of_block]
                described = [metadata[index] for index in of_block] if metadata else None
                shown = torch.cat(pictures)
                pending.append([s.submit(shown, captions, seeds[block], described) for s in self._scorers])
        order = torch.cat(blocks).argsort()
        rewards, valid = _joined([[f.result() for f in futures] for futures in pending], order, len(self._scorers))
        return Trajectories.cat(parts).select(order), rewards, valid

    def _normalise(self, rewards: Tensor, valid: Tensor, names: Sequence[str]) -> None:
        """Take running statistics out of columns (n, R) whose reward asks for it, in place.

        The rows are those of all processes, in the order of seeds, so that all of them come to the same statistics.
        """
        for column, name in enumerate(names):
            if name in self._running:
                rewards[valid, column] = self._running[name].normalise(rewards[valid, column])

    def close(self) -> None:
        """End the scorers' threads."""
        for scorer in self._scorers:
            scorer.close()

    def state_dict(self) -> dict[str, Any]:
        """Running statistics of rewards."""
        return {"rewards": {name: r.state_dict() for name, r in self._running.items()}} if self._running else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave."""
        for name, value in state.get("rewards", {}).items():
            self._running[name].load_state_dict(value)


def _whole_groups(examples: int, images: int, size: int) -> list[Tensor]:
    """Cut rows in block order into parts of about ``size`` rows that hold all images of their captions."""
    rows = torch.arange(images * examples).reshape(images, examples)
    return [part.flatten() for part in rows.split(max(1, size // images), dim=1)]


def _joined(scored: list[list[Scored]], order: Tensor, rewards: int) -> tuple[Tensor, Tensor]:
    """Join parts of images, in a new order: rewards (rows, R) on the CPU, and where all of them are valid."""
    if not scored:
        return torch.zeros(len(order), rewards), torch.ones(len(order), dtype=torch.bool)
    table = [torch.stack([score.rewards.cpu() for score in part], dim=1) for part in scored]
    valid = [torch.stack([score.valid.cpu() for score in part], dim=1).all(1) for part in scored]
    return torch.cat(table)[order], torch.cat(valid)[order]
