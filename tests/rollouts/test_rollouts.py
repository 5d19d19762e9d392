"""Rollouts: recorded and replayed densities agree, seeds decide everything, failures name their image."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier, get_ident
from types import SimpleNamespace
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from diffalign.batch import ImageBatch
from diffalign.diffusion.level import Grid
from diffalign.errors import RunStopped, UserError
from diffalign.rewards.base import Reward, RewardInfo
from diffalign.rewards.combine import Normalised
from diffalign.rollouts.gather import gather_rows
from diffalign.rollouts.rollout import RolloutConfig, Rollouts
from diffalign.rollouts.scoring import RolloutScorer
from diffalign.rollouts.steps import StochasticSteps
from diffalign.rollouts.trajectory import Storage, Trajectories, image_seeds, replay, roll_out
from diffalign.strategies.advantages import group_advantages
from diffalign.strategies.base import Reduce
from diffalign.strategies.policy_gradient import ClippedObjective
from tests.battery.on_policy import REWARDS, captions, context
from tests.factories import ToyPolicy

T = TypeVar("T")

PROMPTS = ("a a", "a bb", "a ccc")
SHAPE = (3, 4, 4)
FAMILIES = ("epsilon", "v_prediction", "flow")


def sampled(policy: ToyPolicy, seeds: Tensor | None = None, **options: Any) -> tuple[StochasticSteps, Trajectories]:
    steps = StochasticSteps(policy.process, 5)
    seeds = image_seeds(torch.arange(3), 2) if seeds is None else seeds
    condition = policy.encode_prompts((PROMPTS * 2)[: len(seeds)])
    return steps, roll_out(policy, steps, condition, seeds, SHAPE, **options)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_replay_before_any_update_gives_the_recorded_density(
    family: str, dtype: torch.dtype, guidance_scale: float
) -> None:
    policy = ToyPolicy(family)
    steps, trajectories = sampled(policy, guidance_scale=guidance_scale, storage=Storage(dtype))
    replayed = torch.stack([replay(policy, steps, trajectories, step) for step in range(len(steps))], dim=1)
    assert replayed.requires_grad
    assert (replayed - trajectories.log_probs).exp().eq(1).all()
    assert trajectories.latents.dtype == dtype
    assert trajectories.latents.shape == (6, len(steps) + 1, *SHAPE)


def test_a_grid_is_sent_to_a_device_once(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.device] = []
    send = Grid.to
    monkeypatch.setattr(Grid, "to", lambda grid, device: sent.append(device) or send(grid, device))
    sampled(ToyPolicy())
    assert sent == [torch.device("cpu")]


def test_an_image_depends_on_its_seed_alone() -> None:
    policy, seeds = ToyPolicy(), image_seeds(torch.arange(3), 2)
    steps, whole = sampled(policy, seeds)
    condition = policy.encode_prompts(PROMPTS * 2)
    part = roll_out(policy, steps, condition.select(slice(2, 5)), seeds[2:5], SHAPE)
    torch.testing.assert_close(part.latents, whole.select(slice(2, 5)).latents)
    assert len(set(seeds.tolist())) == 6


def test_images_can_share_their_initial_noise() -> None:
    starts = torch.arange(3).repeat(2)
    _, trajectories = sampled(ToyPolicy(), start_seeds=starts)
    first, second = trajectories.latents.chunk(2)
    assert first[:, 0].equal(second[:, 0])
    assert not first[:, 1].equal(second[:, 1])


@pytest.mark.parametrize("options", [{"eta": 0.0}, {"noise_level": 0.0}])
def test_steps_without_randomness_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(UserError, match="density"):
        StochasticSteps(ToyPolicy().process, 5, **options)


class Brightness(Reward):
    """Mean of the pixels; raises for one caption, gives NaN for another."""

    info = RewardInfo("brightness", "share of white", (0.0, 1.0), False)

    def __init__(self, raises: str = "", odd: str = "") -> None:
        self.raises, self.odd = raises, odd

    def score(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None
    ) -> Tensor:
        if self.raises in prompts:
            raise RuntimeError("no idea")
        scores = images.flatten(1).mean(1)
        return torch.where(torch.tensor([p == self.odd for p in prompts]), torch.nan, scores)


@pytest.mark.parametrize("reward", [Brightness(raises="a bb"), Brightness(odd="a bb")])
def test_failing_rewards_stop_with_the_image_or_skip_it(reward: Brightness, tmp_path: Path) -> None:
    images, seeds = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(0)), torch.tensor([5, 6, 7])
    with pytest.raises(UserError, match="'a bb' with seed 6"):
        RolloutScorer(reward, tmp_path).score(images, PROMPTS, seeds)
    assert (tmp_path / "seed-6.png").is_file()
    assert json.loads((tmp_path / "seed-6.json").read_text())["prompt"] == "a bb"
    scorer = RolloutScorer(reward, tmp_path, "skip")
    scored = scorer.submit(images, PROMPTS, seeds).result()
    scorer.close()
    assert scored.valid.tolist() == [True, False, True]
    torch.testing.assert_close(scored.rewards[[0, 2]], images[[0, 2]].flatten(1).mean(1))


class Elsewhere(Reward):
    """Has a network on an accelerator, if only by name."""

    info = Brightness.info

    def __init__(self, device: str | None = None) -> None:
        self.network = torch.nn.Linear(1, 1)
        if device is not None:
            held = SimpleNamespace(device=torch.device(device))
            self.network.parameters = lambda: [held]  # type: ignore[assignment, method-assign, return-value]

    def score(self, images: Any, prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]] | None = None) -> Tensor:
        return torch.ones(len(prompts))


@pytest.mark.parametrize(
    ("images", "network", "expected"),
    [("cuda:3", None, ["cuda:3"]), ("cuda:3", "cuda:1", ["cuda:1"]), ("cpu", "cuda:2", ["cuda:2"]), ("cpu", None, [])],
)
def test_a_thread_works_on_the_device_of_its_process(
    images: str, network: str | None, expected: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[str, int]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: chosen.append((str(device), get_ident())))
    scorer = RolloutScorer(Elsewhere(network), tmp_path)
    shown: Any = SimpleNamespace(device=torch.device(images))
    for _ in range(2):
        assert scorer.submit(shown, PROMPTS, torch.zeros(3)).result().valid.all()
    scorer.close()
    assert [device for device, _ in chosen] == expected
    assert all(thread != get_ident() for _, thread in chosen)


def in_two_processes(work: Callable[[int, Reduce], T]) -> list[T]:
    """Run work(rank, reduce) in two threads whose ``reduce`` sums over both."""
    boxes: list[Tensor | None] = [None, None]
    barrier = Barrier(2, timeout=20)

    def process(rank: int) -> T:
        def reduce(value: Tensor) -> Tensor:
            boxes[rank] = value
            barrier.wait()
            total = boxes[0] + boxes[1]  # type: ignore[operator]
            barrier.wait()
            return total

        return work(rank, reduce)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(process, range(2)))


def test_two_processes_see_the_groups_of_one() -> None:
    rewards, groups = torch.tensor([0.1, 0.9, 0.4, 0.7, 0.2]), torch.tensor([0, 1, 0, 1, 0])
    alone = group_advantages(rewards, groups)
    parts = (slice(0, 3), slice(3, 5))

    def advantages(rank: int, reduce: Reduce) -> Tensor:
        every, own = gather_rows(rewards[parts[rank]], rank, 2, reduce)
        named, _ = gather_rows(groups[parts[rank]], rank, 2, reduce)
        return group_advantages(every, named)[own]

    assert torch.cat(in_two_processes(advantages)).equal(alone)


def test_a_reward_that_fails_on_one_process_ends_all_of_them(tmp_path: Path) -> None:
    """Without an agreement the others would wait for it forever."""

    def message(rank: int, reduce: Reduce) -> str:
        policy, engine = ToyPolicy(), Rollouts(RolloutConfig(images_per_prompt=2, rollout_steps=2))
        reward = Brightness(raises="" if rank else captions(policy, 4)[0].prompts[0])
        ctx = context(policy, {"bright": reward}, rank=rank, world_size=2, reduce=reduce)
        ctx.folder = tmp_path
        engine.open(ctx)
        with pytest.raises(RunStopped) as stopped:
            engine(ctx, captions(policy, 4)[rank::2])
        engine.close()
        return str(stopped.value)

    first, second = in_two_processes(message)
    assert "raised RuntimeError: no idea" in first
    assert "on another process" in second


def test_running_statistics_are_those_of_all_processes_taken_once_a_rollout() -> None:
    config = RolloutConfig(images_per_prompt=2, rollout_steps=2, rollout_batch_size=2)

    def judged(parts: Callable[[list[ImageBatch]], list[ImageBatch]], **place: Any) -> tuple[Tensor, dict[str, Any]]:
        policy, engine = ToyPolicy(), Rollouts(config)
        ctx = context(policy, {"bright": Normalised(REWARDS["bright"]), "red": REWARDS["red"]}, **place)
        engine.open(ctx)
        rollouts = [engine(ctx, parts(captions(policy, 4, start=epoch))) for epoch in range(2)]
        return torch.stack([rollout.judged.rewards for rollout in rollouts]), engine.state_dict()

    def share(rank: int, reduce: Reduce) -> tuple[Tensor, dict[str, Any]]:
        return judged(lambda batches: batches[rank::2], rank=rank, world_size=2, reduce=reduce)

    policy, raw = ToyPolicy(), Rollouts(config)
    raw.open(context(policy))
    seen = torch.stack([raw(context(policy), captions(policy, 4, start=epoch)).judged.rewards for epoch in range(2)])
    rewards, state = judged(list)
    for epoch in range(2):  # the statistics of a rollout are those of all images up to and with it
        known = seen[: epoch + 1, :, 0].double()
        expected = (seen[epoch, :, 0] - known.mean()) / (known.std(correction=0) + 1e-4)
        torch.testing.assert_close(rewards[epoch, :, 0], expected.float())
    assert rewards[..., 1].equal(seen[..., 1])
    first, second = in_two_processes(share)
    assert first[0].equal(second[0])
    assert first[1] == second[1]
    torch.testing.assert_close(first[0], rewards)
    assert first[1]["rewards"]["bright"] == pytest.approx(state["rewards"]["bright"])


def brightness_after_training(family: str, direction: float, epochs: int = 8, images: int = 8) -> float:
    """Train towards bright (1) or dark (-1) images; return the brightness of images that no training saw."""
    policy, objective = ToyPolicy(family), ClippedObjective(clip_range=0.2)
    steps, condition = StochasticSteps(policy.process, 4), policy.encode_prompts(PROMPTS * images)
    groups = torch.arange(3).repeat(images)
    optimizer = torch.optim.Adam(policy.adapters.parameters("default"), lr=0.05)

    def brightness(start: int) -> tuple[Trajectories, Tensor]:
        seeds = image_seeds(torch.arange(start, start + 3), images)
        trajectories = roll_out(policy, steps, condition, seeds, SHAPE)
        return trajectories, policy.decode(trajectories.final).detach().flatten(1).mean(1)

    for epoch in range(epochs):
        trajectories, rewards = brightness(3 * epoch)
        advantages = group_advantages(direction * rewards, groups, "group")
        log_probs = torch.stack([replay(policy, steps, trajectories, step) for step in range(len(steps))], dim=1)
        optimizer.zero_grad()
        objective(log_probs - trajectories.log_probs, advantages).loss.backward()
        optimizer.step()
    return brightness(10**6)[1].mean().item()


@pytest.mark.parametrize("family", ["epsilon", "flow"])
def test_policy_gradient_follows_the_reward_both_ways(family: str) -> None:
    """The same held-out noise for all three, so that only what was learned differs."""
    dark, start, bright = (
        brightness_after_training(family, direction, epochs) for direction, epochs in ((-1.0, 8), (1.0, 0), (1.0, 8))
    )
    assert dark < start < bright
    assert bright - dark > 0.02
