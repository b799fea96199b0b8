"""The reward scale against returns computed the long way."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from brc_fast import RewardNormalizer

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
