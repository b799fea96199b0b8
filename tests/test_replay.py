"""The replay buffer against a list of tuples: what it holds and what it returns."""

from __future__ import annotations

import functools
import itertools
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require

from brc_fast.replay import DeviceReplayBuffer, Field, ReplayBuffer

require("hypothesis")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from replay_oracle import ENDS, Feed, assert_same, filled, more, read_all

STEPS = st.integers(1, 10)
DISCOUNT = st.sampled_from([0.0, 0.5, 0.97, 1.0])


class ReplayMachine(RuleBasedStateMachine):
    """Any mix of adds, ends, jumps, wraps, samples, refusals, saves and loads, against the list of tuples."""

    @initialize(
        data=st.data(),
        task_ids=st.sampled_from([[0], [0, 0], [0, 1], [1, 0, 1], [2, 0, 1, 0, 0]]),
        seed=st.integers(0, 2**64 - 1),
        stack=st.sampled_from([1, 2, 4]),
    )
    def start(self, data: st.DataObject, task_ids: list[int], seed: int, stack: int) -> None:
        self.tasks = max(task_ids) + 1
        self.feed = Feed(self.capacity(data), task_ids, Field((3,), stack=stack), seed=seed)
        self.folders = [Path(tempfile.mkdtemp()), Path(tempfile.mkdtemp())]
        self.generations: list[list[Feed]] = [[], []]  # of each folder, the newest first
        self.checks = 0

    def capacity(self, data: st.DataObject) -> int | list[int]:
        sizes = st.integers(1, 7)
        return data.draw(sizes | st.lists(sizes, min_size=self.tasks, max_size=self.tasks))

    @rule(data=st.data(), steps=st.integers(1, 4))
    def add(self, data: st.DataObject, steps: int) -> None:
        streams = st.lists(st.integers(0, len(self.feed.task_ids) - 1), unique=True)
        for _ in range(steps):
            named = data.draw(streams)
            jumps = [data.draw(st.booleans()) for _ in named]
            self.feed.add(named, jumps, [data.draw(st.sampled_from(ENDS)) for _ in named])

    @precondition(lambda self: self.feed.stored())
    @rule(num_batches=st.integers(1, 3), data=st.data(), n_step=STEPS, discount=DISCOUNT)
    def sample(self, num_batches: int, data: st.DataObject, n_step: int, discount: float) -> None:
        stored = [self.feed.task_ids[stream] for stream, _ in self.feed.stored()]
        tasks = data.draw(st.none() | st.permutations(sorted(set(stored))))
        named = range(self.tasks) if tasks is None else tasks
        shares = st.lists(st.sampled_from([0.0, 0.2, 1.0, 3.0]), min_size=len(named), max_size=len(named))
        weights: Any = data.draw(st.none() | st.just("equal") | shares)
        if weights is not None:
            given = [1.0] * len(named) if weights == "equal" else weights
            if sum(given) == 0 or any(
                share > 0 and task not in stored for share, task in zip(given, named, strict=True)
            ):
                weights = None
        most = sum(task in named for task in stored)
        self.feed.check_sample(
            data.draw(st.integers(1, most)),
            num_batches,
            n_step=n_step,
            discount=discount,
            tasks=tasks,
            weights=weights,
        )

    @rule(to=st.integers(0, 1), link=st.booleans())
    def save(self, to: int, link: bool) -> None:
        self.feed.buffer.save(self.folders[to], previous=self.folders[1 - to] if link else None)
        self.generations[to] = [self.feed.copied(), *self.generations[to][:1]]

    @precondition(lambda self: any(self.generations))
    @rule(data=st.data())
    def load(self, data: st.DataObject) -> None:
        """Into another buffer that is not empty, of the same capacities or other ones."""
        found = [(folder, age) for folder in (0, 1) for age in range(len(self.generations[folder]))]
        folder, age = data.draw(st.sampled_from(found))
        capacity = self.capacity(data) if data.draw(st.booleans()) else None
        self.feed = self.generations[folder][age].loaded(self.folders[folder], capacity, previous=age == 1)

    @rule(field=st.sampled_from(["observations", "actions", "rewards", "successors", "streams"]))
    def refused(self, field: str) -> None:
        streams = list(range(len(self.feed.task_ids)))
        added = self.feed.arguments(streams, [True] * len(streams), [ENDS[1]] * len(streams))
        added[field].flat[-1] = len(streams) if field == "streams" else np.nan
        with pytest.raises(ValueError, match=field):
            self.feed.buffer.add(**added)

    @invariant()
    def content(self) -> None:
        self.checks += 1
        self.feed.check_content(self.checks % 10 + 1, 0.9)

    def teardown(self) -> None:
        for folder in getattr(self, "folders", []):
            shutil.rmtree(folder)


TestReplayMachine = ReplayMachine.TestCase
TestReplayMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


@pytest.mark.parametrize("capacity", [1, 2, 3, 7])
@pytest.mark.parametrize("task_ids", [(0,), (0, 0), (1, 0, 0)])
def test_small_and_odd_capacities_wrap_and_name_the_documented_transitions(
    capacity: int, task_ids: tuple[int, ...]
) -> None:
    feed = Feed(capacity, task_ids, seed=3)
    for _ in range(3 * capacity + 2):
        more(feed, 1)
        feed.check_content(3, 0.9)
        feed.check_sample(len(feed.stored()), 2, n_step=2, discount=0.9)


def test_the_successor_never_comes_from_another_episode_or_stream() -> None:
    """Not even where the caller starts another episode without having said that one ended."""
    buffer = ReplayBuffer(100, 1, 1, task_ids=[0, 0, 0])
    for step in range(30):
        places = 1000 * np.arange(3) + 100 * (step // 10) + step % 10
        observations = places.astype(np.float32)[:, None]
        no = np.zeros(3, bool)
        buffer.add(observations, np.zeros((3, 1), np.float32), observations[:, 0], no, no, observations + 1)
    batch = buffer.sample(90, 20)
    assert torch.equal(batch.next_observations, batch.observations + 1)
    assert len(batch.observations.unique()) == 90
    several = buffer.sample(90, 20, n_step=4, discount=1.0)
    steps = several.next_observations - several.observations
    left = 10 - several.observations % 10
    assert torch.equal(steps, left.clamp(max=4))


def test_a_successor_that_differs_only_in_the_sign_of_zero_is_kept() -> None:
    feed = Feed(4)
    feed.add()
    for observation, successor in ((0.0, -0.0), (0.0, 0.0), (-0.0, 0.0)):
        added = feed.arguments([0], [True], [ENDS[0]])
        added["observations"][:] = observation
        added["successors"][:] = successor
        feed.give(added, feed.buffer)
        feed.remember(added)
    feed.check_content(3, 1.0)
    assert feed.buffer._store.side_size == 3


def test_a_time_limit_keeps_mask_one_and_an_end_gives_zero() -> None:
    buffer = ReplayBuffer(4, 1, 1, task_ids=[0] * 4)
    terminated, truncated = np.array(ENDS).T.copy()
    columns = np.zeros((4, 1), np.float32)
    buffer.add(columns, columns, np.arange(4, dtype=np.float32), terminated, truncated, columns)
    batch = buffer.sample(4, 20)
    assert torch.equal(batch.masks, torch.tensor([1.0, 0.0, 1.0, 0.0])[batch.rewards.long()])


def test_several_steps_sum_discounted_rewards_up_to_an_end_a_jump_and_the_newest() -> None:
    buffer = ReplayBuffer(10, 1, 1, seed=1)
    for step in range(7):  # an end after step 2, a jump before step 5
        place = np.full((1, 1), step + (100 if step >= 5 else 0), np.float32)
        end = np.array([step == 2])
        reward = np.full(1, 10.0**step, np.float32)
        buffer.add(place, place, reward, end, np.zeros(1, bool), place + 1)
    got = read_all(buffer, 3, 0.5)
    assert got["rewards"].tolist() == [1 + 5 + 25, 10 + 50, 100, 1e3 + 5e3, 1e4, 1e5 + 5e5, 1e6]
    assert got["masks"].tolist() == [0, 0, 0, 0.5, 1, 0.5, 1]
    assert got["next_observations"][:, 0].tolist() == [3, 3, 3, 5, 5, 107, 107]
    assert got["observations"][:, 0].tolist() == [0, 1, 2, 3, 4, 105, 106]


def test_dtypes_of_a_batch_do_not_follow_the_default_dtype() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        batch = filled().buffer.sample(6)
    finally:
        torch.set_default_dtype(torch.float32)
    assert [column.dtype for column in batch.columns] == [torch.float32] * 5 + [torch.int64]
    assert [list(column.shape) for column in batch.columns] == [
        [6, 3],
        [6, 2],
        [6],
        [6],
        [6, 3],
        [6],
    ]


def test_torch_tensors_and_strided_arrays_are_stored_like_numpy_arrays() -> None:
    feed, twin = filled(), filled()
    added = feed.arguments([0, 1], [True, False], [ENDS[0], ENDS[1]])
    leaf = torch.tensor(added["observations"], requires_grad=True)
    feed.buffer.add(**{name: torch.tensor(value) for name, value in added.items()} | {"observations": leaf})
    twin.buffer.add(**{name: np.repeat(value, 2, axis=0)[::2] for name, value in added.items()})
    feed.remember(added)
    feed.check_content()
    assert_same(read_all(feed.buffer), read_all(twin.buffer))
    reverse = feed.arguments([1, 0], [True, True], [ENDS[0], ENDS[1]])
    fortran = {name: np.asfortranarray(value) for name, value in reverse.items()}
    for value in fortran.values():
        value.flags.writeable = False
    feed.buffer.add(**fortran)
    feed.remember(reverse)
    feed.check_content()


def test_what_was_given_may_be_changed_afterwards() -> None:
    feed = Feed(5)
    added = feed.arguments([0], [False], [ENDS[0]])
    feed.give(added, feed.buffer)
    feed.remember(added)
    for value in added.values():
        value[...] = 0
    feed.check_content()


def test_capacity_is_per_task_and_rounded_up_per_stream() -> None:
    buffer = ReplayBuffer(10, 3, 2, task_ids=[0, 0, 0, 1])
    assert buffer.capacity_per_task.tolist() == [12, 10]
    assert (len(buffer), buffer.num_streams, buffer.size_per_task.tolist()) == (0, 4, [0, 0])
    assert ReplayBuffer([10, 7], 3, 2, task_ids=[1, 0, 1]).capacity_per_task.tolist() == [10, 8]


@pytest.mark.parametrize("streams", [1, 64])
def test_memory_is_at_most_062_of_storing_every_observation_twice(streams: int) -> None:
    buffer = ReplayBuffer(1_000_000, 67, 24, task_ids=[0] * streams)
    twice = 1_000_000 * (2 * 67 + 24 + 2) * 4
    assert 0.5 * twice < buffer.nbytes <= 0.62 * twice


def test_freed_side_slots_are_used_again() -> None:
    feed = filled(capacity=100, task_ids=(0,), steps=150)
    for _ in range(100):
        feed.add(ends=[ENDS[1]])
    before = feed.buffer.nbytes
    for _ in range(300):
        feed.add(ends=[ENDS[2]], jumps=[True])
    assert feed.buffer._store.side_size == 100
    assert feed.buffer._store.slots < 256
    assert feed.buffer.nbytes == before


# ---- Jumps

KINDS = [ReplayBuffer, functools.partial(DeviceReplayBuffer, device="cpu")]


@pytest.mark.parametrize("kind", KINDS)
def test_transitions_that_do_not_go_on_from_the_one_before_are_counted(kind: Any, tmp_path: Path) -> None:
    feed = Feed(9, (0, 1, 0), seed=3)
    buffer = kind(9, 3, 2, task_ids=[0, 1, 0], seed=3)

    def jumps() -> int:
        pairs = (pair for rows in feed.history for pair in itertools.pairwise(rows))
        return sum(row.jumped and not before.ended for before, row in pairs)

    for _ in range(20):
        more(feed, 1, buffer)
        assert buffer.jumps == feed.buffer.jumps == jumps()
    feed.buffer.save(tmp_path)
    buffer.load(tmp_path)
    assert buffer.jumps == 0
    streams = [0, 1, 2]
    feed.add(streams, [True] * 3, [ENDS[0]] * 3, buffer)
    jumped = buffer.jumps
    buffer.reset()
    feed.add(streams, [True] * 3, [ENDS[0]] * 3, buffer)
    assert buffer.jumps == jumped
    buffer.clear()
    assert buffer.jumps == 0


def test_rows_that_come_at_once_are_counted_too() -> None:
    buffer = ReplayBuffer(100, 1, 1)
    seen, no = np.arange(10, dtype=np.float32)[:, None], np.zeros(10, bool)
    ended = no.copy()
    ended[3] = True
    given = (seen, seen, seen[:, 0], no, ended)
    buffer.extend(*given, successors=seen)
    assert buffer.jumps == 8
    buffer.extend(*given, successors=seen + 1)
    assert buffer.jumps == 9  # from the last of those
    buffer.extend(*given, successors=seen, starts=~no)
    buffer.extend(*given)
    assert buffer.jumps == 10


WRONG = r"n_step sums hardly more than one step: \d+ of \d+ transitions did not go on"


def steps(buffer: Any, count: int, stride: float) -> None:
    for step in range(count):
        seen = np.full((2, 1), step, np.float32)
        no = np.zeros(2, bool)
        buffer.add(seen, seen, seen[:, 0], no, no, seen + np.float32(stride))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ahead", [False, True])
def test_steps_that_never_follow_each_other_are_told_of_once(kind: Any, ahead: bool) -> None:
    buffer = kind(2000, 1, 1, task_ids=[0, 0])

    def sample(n_step: int = 3) -> None:
        if ahead:
            with buffer.prefetch(4, n_step=n_step, discount=0.9) as batches:
                next(batches)
        else:
            buffer.sample(4, n_step=n_step, discount=0.9)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(buffer, 100, stride=5.0)
        sample()  # too few to tell
        steps(buffer, 300, stride=5.0)
        sample(1)
    with pytest.warns(UserWarning, match=WRONG):
        sample()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sample()
        right = kind(2000, 1, 1, task_ids=[0, 0])
        steps(right, 200, stride=5.0)
        steps(right, 300, stride=1.0)
        right.sample(4, n_step=3, discount=0.9)


def test_a_prefetcher_that_began_early_tells_it_too() -> None:
    buffer = ReplayBuffer(2000, 1, 1, task_ids=[0, 0])
    with buffer.prefetch(4, n_step=2, discount=0.9) as batches:
        steps(buffer, 300, stride=5.0)
        with pytest.warns(UserWarning, match=WRONG):
            next(batches)
