"""The reward scale against returns computed the long way."""

from __future__ import annotations

import time

import numpy as np
import pytest
import torch

from brc_fast import RewardNormalizer
from brc_fast.agents import normalizer as normalizers

DISCOUNT = 0.9
ALPHA = torch.tensor(0.2)


def make(task_ids: list[int], **settings: object) -> RewardNormalizer:
    return RewardNormalizer(task_ids, discount=DISCOUNT, v_max=5.0, target_entropy=-3.0, **settings)


def returns_of(rewards: list[float], bootstrap: float) -> list[float]:
    """Discounted returns by their definition, every one from its own sum."""
    tail = [*rewards, bootstrap]
    return [sum(r * DISCOUNT**i for i, r in enumerate(tail[t:])) for t in range(len(rewards))]


def feed(normalizer: RewardNormalizer, slots: list[list[float]], ends: list[str], **extra: object) -> None:
    """Episodes of equal length, one per slot, each ending as `ends` says."""
    length = len(slots[0])
    for t in range(length):
        last = t == length - 1
        normalizer.update(
            np.array([slot[t] for slot in slots], np.float32),
            np.array([last and end == "terminated" for end in ends]),
            np.array([last and end == "truncated" for end in ends]),
            **extra,
        )


def test_extremes_are_those_of_all_returns_of_finished_episodes_per_task() -> None:
    normalizer = make([0, 1, 0])
    slots = [[1.0, -2.0, 0.5], [0.0, 3.0, 1.0], [4.0, 0.0, -1.0]]
    feed(normalizer, slots, ["terminated", "truncated", "truncated"])
    means = [np.mean(slot) / (1 - DISCOUNT) for slot in slots]
    first = returns_of(slots[0], 0.0) + returns_of(slots[2], means[2])
    second = returns_of(slots[1], means[1])
    np.testing.assert_allclose(normalizer.return_min, [min(first), min(second)])
    np.testing.assert_allclose(normalizer.return_max, [max(first), max(second)])


def test_rewards_are_zero_until_a_task_has_finished_an_episode() -> None:
    normalizer = make([0, 1])
    normalizer.update(np.ones(2, np.float32), np.array([True, False]), np.array([False, False]))
    scaled = normalizer.normalize(torch.ones(2), torch.tensor([0, 1]), ALPHA)
    expected = 1.0 / ((1.0 + 0.2 * 1.5 / (1 - DISCOUNT)) / 5.0)
    torch.testing.assert_close(scaled, torch.tensor([expected, 0.0]))


def test_environments_of_one_task_finish_at_different_times() -> None:
    normalizer = make([0, 0])
    no = np.zeros(2, bool)
    normalizer.update(np.array([1.0, 5.0], np.float32), np.array([True, False]), no)
    assert normalizer.return_max[0] == 1.0
    normalizer.update(np.array([2.0, 5.0], np.float32), np.array([True, True]), no)
    assert normalizer.return_max[0] == pytest.approx(5.0 + DISCOUNT * 5.0)
    assert normalizer.return_min[0] == 1.0


def test_episodes_longer_than_the_first_buffer_are_kept_whole() -> None:
    normalizer = make([0])
    rewards = list(np.random.default_rng(0).normal(size=1000))
    feed(normalizer, [rewards], ["truncated"])
    expected = returns_of(rewards, float(np.mean(rewards)) / (1 - DISCOUNT))
    np.testing.assert_allclose(normalizer.return_max[0], max(expected), rtol=1e-5)
    np.testing.assert_allclose(normalizer.return_min[0], min(expected), rtol=1e-5)


def test_a_dropped_step_forgets_its_episode() -> None:
    normalizer = make([0])
    no, yes = np.zeros(1, bool), np.ones(1, bool)
    normalizer.update(np.array([100.0], np.float32), no, no)
    normalizer.update(np.array([0.0], np.float32), no, yes, dropped=yes)
    normalizer.update(np.array([1.0], np.float32), yes, no)
    assert normalizer.return_max[0] == 1.0


def test_the_critic_can_bootstrap_a_truncation() -> None:
    normalizer = make([0], bootstrap="critic")
    feed(normalizer, [[1.0, 1.0]], ["truncated"], values=np.array([7.0], np.float32))
    assert normalizer.return_max[0] == pytest.approx(max(returns_of([1.0, 1.0], 7.0)))
    with pytest.raises(ValueError, match=r"values \[N\] are needed"):
        feed(normalizer, [[1.0, 1.0]], ["truncated"])


def test_the_measured_entropy_replaces_half_the_target() -> None:
    normalizer = make([0, 1], entropy="measured")
    feed(normalizer, [[1.0], [2.0]], ["terminated", "terminated"])
    scale = normalizer.scale(ALPHA, torch.tensor([-4.0, 0.5]))
    bonus = 0.2 / (1 - DISCOUNT)
    torch.testing.assert_close(scale, torch.tensor([1.0 + 4.0 * bonus, 2.0 + 0.5 * bonus]) / 5.0)
    with pytest.raises(ValueError, match=r"entropies \[T\] are needed"):
        normalizer.scale(ALPHA)


def test_a_restored_normalizer_goes_on_in_the_middle_of_an_episode() -> None:
    rng = np.random.default_rng(1)
    one, two = make([0, 1, 1]), make([0, 1, 1])
    for step in range(300):
        rewards = rng.normal(size=3).astype(np.float32)
        ends = rng.random((2, 3)) < 0.01
        one.update(rewards, *ends)
        if step >= 150:
            two.update(rewards, *ends)
        if step == 149:
            two.load_state_dict(one.state_dict())
    np.testing.assert_array_equal(one.return_min, two.return_min)
    np.testing.assert_array_equal(one.return_max, two.return_max)
    with pytest.raises(ValueError, match=r"normalizer return_min must have shape \[1\], got \[2\]"):
        make([0, 0, 0]).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("task_ids", "settings", "message"),
    [
        ([], {}, "task_ids must be N >= 1 ids from 0"),
        ([-1], {}, "task_ids must be N >= 1 ids from 0"),
        ([0], {"discount": 1.0}, r"discount must be in \[0, 1\), got 1.0"),
        ([0], {"v_max": 0.0}, "v_max must be positive, got 0.0"),
    ],
)
def test_impossible_settings_are_refused(task_ids: list[int], settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RewardNormalizer(task_ids, target_entropy=-1.0, **settings)


def test_a_task_that_has_only_ever_returned_nothing_has_rewards_of_zero_without_an_entropy_bonus() -> None:
    normalizer = RewardNormalizer([0], discount=DISCOUNT, v_max=5.0, target_entropy=0.0)
    feed(normalizer, [[0.0, 0.0]], ["truncated"])
    assert normalizer.normalize(torch.zeros(3), torch.zeros(3, dtype=torch.long), ALPHA).tolist() == [0.0] * 3
    feed(normalizer, [[0.0, 2.0]], ["terminated"])
    scaled = normalizer.normalize(torch.tensor([2.0]), torch.zeros(1, dtype=torch.long), ALPHA)
    assert scaled.item() == pytest.approx(5.0)


def test_episodes_of_any_lengths_may_end_at_once() -> None:
    """Each with the returns of its own rewards, and not of an earlier, longer episode in its place."""
    rng, slots = np.random.default_rng(0), 40
    normalizer = make([slot % 4 for slot in range(slots)])
    normalizer.update(np.full(slots, 100.0, np.float32), np.zeros(slots, bool), np.zeros(slots, bool))
    normalizer.forget(np.ones(slots, bool))
    starts = rng.integers(0, 90, slots)
    rewards = rng.normal(size=(90, slots)).astype(np.float32)
    none = np.zeros(slots, bool)
    for step in range(90):
        normalizer.update(rewards[step], none, none if step < 89 else ~none, dropped=step < starts)
    for task in range(4):
        found = []
        for slot in range(task, slots, 4):
            episode = rewards[starts[slot] :, slot].astype(np.float64)
            found += returns_of(list(episode), episode.mean() / (1.0 - DISCOUNT))
        np.testing.assert_allclose(normalizer.return_min[task], min(found), rtol=1e-9)
        np.testing.assert_allclose(normalizer.return_max[task], max(found), rtol=1e-9)


def test_a_thousand_episodes_end_at_once_in_the_time_of_a_few_steps() -> None:
    slots, steps = 1024, 1000
    normalizer = RewardNormalizer([0] * slots, target_entropy=-1.0)
    none, ones = np.zeros(slots, bool), np.ones(slots, np.float32)
    for _ in range(steps - 1):
        normalizer.update(ones, none, none)
    start = time.thread_time()
    normalizer.update(ones, none, ~none)
    assert time.thread_time() - start < 0.05
    assert normalizer.return_max[0] == pytest.approx(100.0)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (
            {"rewards": np.array([1.0, np.nan], np.float32)},
            r"rewards must be finite, got nan from environment 1",
        ),
        (
            {"rewards": np.array([np.inf, 0.0], np.float32)},
            r"rewards must be finite, got inf from environment 0",
        ),
        ({"rewards": np.ones((2, 1), np.float32)}, r"rewards must have shape \[N\] = \[2\], got \[2, 1\]"),
        ({"terminated": np.zeros(3, bool)}, r"terminated must have shape \[N\] = \[2\], got \[3\]"),
        ({"values": np.float32(1.0)}, r"values must have shape \[N\] = \[2\], got \[\]"),
    ],
)
def test_what_is_refused_leaves_the_scale_as_it_was(given: dict[str, np.ndarray], told: str) -> None:
    normalizer, no = make([0, 0]), np.zeros(2, bool)
    normalizer.update(np.ones(2, np.float32), no, no)
    before = normalizer.state_dict()
    with pytest.raises(ValueError, match=told):
        normalizer.update(**{"rewards": np.ones(2, np.float32), "terminated": no, "truncated": ~no, **given})
    for name, value in normalizer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_dropped_reward_may_be_anything() -> None:
    normalizer, no = make([0, 0]), np.zeros(2, bool)
    normalizer.update(np.array([1.0, np.nan], np.float32), no, ~no, dropped=np.array([False, True]))
    assert np.isfinite(normalizer.return_max).all()


def test_episodes_that_never_end_are_told_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(normalizers, "ENDLESS", 5)
    normalizer, no = make([0, 1]), np.zeros(2, bool)
    for step in range(12):
        normalizer.update(np.ones(2, np.float32), np.array([step == 2, False]), no)
    assert caplog.messages == [
        "no episode of task 1 has ended in 5 steps: its rewards are scaled to 0 until one does; "
        "give it a time limit"
    ]
