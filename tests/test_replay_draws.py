"""Which transitions the replay buffer draws, and how evenly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require

from brc_fast import _core
from brc_fast.replay import ReplayBuffer

require("hypothesis", "scipy")

from replay_oracle import Feed, assert_same_batch, filled
from scipy.stats import chisquare


@pytest.mark.parametrize("task_ids", [(0, 1, 2), (0, 1, 1)])
@pytest.mark.parametrize("steps", [5, 17, 30, 31, 43])
def test_every_stored_transition_is_equally_likely(task_ids: tuple[int, ...], steps: int) -> None:
    """While rings grow, when they are full, just after a wrap; the oldest and the newest too."""
    feed = Feed(30, task_ids, seed=5)
    for _ in range(steps):
        feed.add()
    feed.add([1])
    assert_even(feed, feed.buffer.sample(15, 3000).rewards, range(3))


@pytest.mark.parametrize("capacity", [[40, 7, 100], [9, 33, 2]])
def test_every_transition_is_equally_likely_after_a_load_into_other_capacities(
    capacity: list[int], tmp_path: Path
) -> None:
    feed = Feed([12, 20, 40], (0, 1, 1, 2), seed=6)
    for step in range(35):
        feed.add([stream for stream in range(4) if step < 9 * (stream + 1)])
    feed.buffer.save(tmp_path)
    loaded = feed.loaded(tmp_path, capacity)
    assert_even(loaded, loaded.buffer.sample(10, 5000).rewards, range(3))
    loaded.add()
    assert_even(loaded, loaded.buffer.sample(10, 5000).rewards, range(3))


def assert_even(feed: Feed, sampled: torch.Tensor, tasks: Any) -> None:
    """Every stored transition of these tasks was drawn equally often, by its reward, and no other."""
    rewards, counts = np.unique(sampled.numpy(), return_counts=True)
    stored = [at for at in feed.stored() if feed.task_ids[at[0]] in tasks]
    assert set(rewards) == {feed.history[stream][number].reward for stream, number in stored}
    assert chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(
    ("tasks", "weights"),
    [
        (None, "equal"),
        ([2, 0], "equal"),
        (None, [1.0, 0.0, 2.5]),
        ([1, 2, 0], [0.1, 3.0, 0.7]),
        ([1], "equal"),
    ],
)
def test_weights_give_each_task_its_share_and_all_its_transitions_the_same(
    tasks: list[int] | None, weights: Any
) -> None:
    feed = Feed([4, 12, 30], (0, 1, 1, 2), seed=8)
    for _ in range(21):
        feed.add()
    feed.check_sample(12, 100, tasks=tasks, weights=weights)
    batch = feed.buffer.sample(11, 3000, tasks=tasks, weights=weights)
    named = [0, 1, 2] if tasks is None else tasks
    given = [1.0] * len(named) if weights == "equal" else weights
    total = torch.zeros(3000, dtype=torch.long)
    for task, share in zip(named, given, strict=True):
        counts = (batch.task_ids == task).sum(1)
        wanted = 11 * share / sum(given)
        assert (counts - wanted).abs().max() < 1
        assert abs(counts.double().mean() - wanted) < 0.02
        total += counts
        if share > 0:
            assert_even(feed, batch.rewards[batch.task_ids == task], [task])
    assert (total == 11).all()
    order = torch.tensor([named.index(task) if task in named else -1 for task in range(3)])[batch.task_ids]
    assert (order.diff(dim=1) >= 0).all()


def test_tasks_without_weights_are_drawn_by_what_they_hold() -> None:
    feed = Feed([4, 12, 30], (0, 1, 1, 2), seed=9)
    for _ in range(21):
        feed.add()
    assert_even(feed, feed.buffer.sample(19, 3000, tasks=[2, 0]).rewards, [0, 2])


def test_equal_seeds_give_equal_draws_and_others_differ() -> None:
    first, same, other = (filled(seed=seed).buffer.sample(7, 9) for seed in (3, 3, 4))
    assert_same_batch(first, same)
    assert not torch.equal(first.rewards, other.rewards)
    high = filled(seed=3 + 2**32).buffer.sample(7, 9)
    assert not torch.equal(first.rewards, high.rewards)


@pytest.mark.parametrize("weights", [None, "equal"])
def test_several_batches_at_once_are_the_batches_of_single_calls(weights: str | None) -> None:
    together, apart = filled().buffer, filled().buffer
    batches = together.sample(6, 4, weights=weights)
    for u in range(4):
        assert_same_batch(batches.update(u), apart.sample(6, weights=weights))
    assert together.draws == apart.draws == 4


def test_a_smaller_batch_is_the_beginning_of_a_larger_one() -> None:
    shorter, longer = (filled().buffer.sample(size, 5, n_step=2, discount=0.9) for size in (3, 6))
    assert_same_batch(shorter, longer.map(lambda column: column[:, :3]))


def test_words_that_would_favour_some_cells_are_rejected() -> None:
    """A few in 200 000, with so many cells."""
    streams, capacity = 1000, 134
    cells = streams * capacity
    buffer = ReplayBuffer(cells, 1, 1, task_ids=[0] * streams, seed=7)
    no = np.zeros(streams, bool)
    for step in range(capacity):
        number = (np.arange(streams) * capacity + step).astype(np.float32)
        buffer.add(number[:, None], number[:, None], number, no, no, number[:, None])
    drawn = buffer.sample(50_000, 4).rewards
    rejected = 0
    for batch in range(4):
        words = [_core.philox4x32((batch, 0, quad, 0), (7, 0)) for quad in range(12_500)]
        product = np.array(words, np.uint64).reshape(-1) * np.uint64(cells)
        again = product % np.uint64(2**32) < 2**32 % cells
        rejected += again.sum()
        first = (product >> np.uint64(32)).astype(np.float32)
        np.testing.assert_array_equal(drawn[batch].numpy()[~again], first[~again])
        assert not np.any(drawn[batch].numpy()[again] == first[again])
    assert rejected > 2


@pytest.mark.parametrize(
    ("counter", "key", "block"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_gives_the_published_blocks(counter: list[int], key: list[int], block: str) -> None:
    assert " ".join(f"{word:08x}" for word in _core.philox4x32(tuple(counter), tuple(key))) == block
