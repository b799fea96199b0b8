"""The replay buffer against a list of tuples, its random numbers, its saved state and its refusals."""

from __future__ import annotations

import math
import threading
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from brc_fast import _core
from brc_fast.batch import Batch
from brc_fast.replay import ReplayBuffer

pytest.importorskip("hypothesis", reason="needs the [test] extra")
pytest.importorskip("scipy", reason="needs the [test] extra")

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from scipy.stats import chisquare

O, A = 3, 2  # noqa: E741
ENDS = [(False, False), (True, False), (False, True), (True, True)]


class Feed:
    """Makes tagged transitions for a buffer and remembers them: the list of tuples to compare with."""

    def __init__(self, capacity: int, task_ids: list[int], seed: int = 0) -> None:
        self.task_ids = task_ids
        self.seed = seed
        self.draws = 0
        self.tag = 0
        self.resize(capacity)
        self.last: list[np.ndarray | None] = [None] * len(task_ids)
        self.stored: list[deque[tuple[Any, ...]]] = [deque() for _ in task_ids]
        self.buffer = self.empty_buffer(seed)

    def resize(self, capacity: int) -> None:
        self.capacity = capacity
        self.rings = [math.ceil(capacity / self.task_ids.count(task)) for task in self.task_ids]

    def empty_buffer(self, seed: int) -> ReplayBuffer:
        return ReplayBuffer(self.capacity, O, A, task_ids=self.task_ids, seed=seed)

    def tagged(self, stream: int) -> np.ndarray:
        self.tag += 1
        return np.array([stream, self.tag, -self.tag], np.float32)

    def arguments(
        self, streams: list[int], jumps: list[bool], ends: list[tuple[bool, bool]]
    ) -> dict[str, Any]:
        """One transition per stream; it goes on from the last successor unless it jumps elsewhere."""
        last = [self.last[stream] for stream in streams]
        observations = [
            self.tagged(stream) if jump or before is None else before
            for stream, jump, before in zip(streams, jumps, last, strict=True)
        ]
        tags = self.tag + np.arange(len(streams), dtype=np.float32)
        return {
            "observations": np.array(observations, np.float32).reshape(-1, O),
            "actions": np.stack([tags, -tags], 1),
            "rewards": tags * 0.5,
            "terminated": np.array([end[0] for end in ends], bool),
            "truncated": np.array([end[1] for end in ends], bool),
            "successors": np.array([self.tagged(stream) for stream in streams], np.float32).reshape(-1, O),
            "streams": np.array(streams, np.int64),
        }

    def remember(self, added: dict[str, Any]) -> None:
        for i, stream in enumerate(added["streams"].tolist()):
            row = tuple(added[name][i].copy() for name in list(added)[:-1])
            self.stored[stream].append(row)
            self.last[stream] = row[-1]
        self.trim()

    def trim(self) -> None:
        for rows, ring in zip(self.stored, self.rings, strict=True):
            while len(rows) > ring:
                rows.popleft()

    def add(
        self,
        streams: list[int] | None = None,
        jumps: list[bool] | None = None,
        ends: list[tuple[bool, bool]] | None = None,
    ) -> None:
        streams = list(range(len(self.task_ids))) if streams is None else streams
        added = self.arguments(streams, jumps or [False] * len(streams), ends or [ENDS[0]] * len(streams))
        self.buffer.add(**added)
        self.remember(added)

    def rows(self) -> list[tuple[int, tuple[Any, ...]]]:
        """(stream, transition), stream after stream and oldest first."""
        return [(stream, row) for stream, rows in enumerate(self.stored) for row in rows]

    def expected(self, indices: list[int]) -> Batch:
        rows = self.rows()
        picked = [rows[index] for index in indices]
        observations, actions, rewards, terminated, _, successors = zip(
            *(row for _, row in picked), strict=True
        )
        return Batch(
            torch.tensor(np.array(observations)),
            torch.tensor(np.array(actions)),
            torch.tensor(np.array(rewards)),
            torch.tensor(1 - np.array(terminated, np.float32)),
            torch.tensor(np.array(successors)),
            torch.tensor([self.task_ids[stream] for stream, _ in picked]),
        )

    def check_content(self) -> None:
        """Every stored transition, read one by one and from the saved state, is the one that was added."""
        sizes = [len(rows) for rows in self.stored]
        assert len(self.buffer) == sum(sizes)
        assert self.buffer.size_per_task.tolist() == np.bincount(self.task_ids, sizes).tolist()
        state = self.buffer.state_dict()
        assert state["sizes"].tolist() == sizes
        assert state["truncated"].tolist() == [bool(row[4]) for _, row in self.rows()]
        ages = [(stream, age) for stream, size in enumerate(sizes) for age in range(size)]
        if not ages:
            return
        expected = self.expected(list(range(len(ages))))
        assert_equal(
            Batch(*map(torch.cat, zip(*(read(self.buffer, *at) for at in ages), strict=True))), expected
        )
        np.testing.assert_array_equal(successors_of(state), expected.next_observations.numpy())
        np.testing.assert_array_equal(state["observations"], expected.observations.numpy())
        np.testing.assert_array_equal(state["terminated"], expected.masks.numpy() == 0)

    def check_sample(self, batch_size: int, num_batches: int) -> None:
        """The sampled transitions are those that the documented random numbers name."""
        batch = self.buffer.sample(batch_size, num_batches)
        assert batch.observations.shape == (num_batches, batch_size, O)
        for u in range(num_batches):
            indices = [draw(self.seed, self.draws + u, i, len(self.rows())) for i in range(batch_size)]
            assert_equal(batch.update(u), self.expected(indices))
        self.draws += num_batches
        assert self.buffer.draws == self.draws


def read(buffer: ReplayBuffer, stream: int, age: int) -> Batch:
    shapes = [(1, O), (1, A), (1,), (1,), (1, O)]
    out = Batch(*(torch.empty(shape) for shape in shapes), torch.empty(1, dtype=torch.int64))
    buffer._store.read(stream, age, *(field.numpy() for field in out))
    return out


def successors_of(state: dict[str, np.ndarray]) -> np.ndarray:
    """What the docstring of state_dict says the successors are."""
    following = np.concatenate([state["observations"][1:], np.zeros((1, O), np.float32)])
    last = np.cumsum(state["sizes"])[state["sizes"] > 0] - 1
    following[last] = state["heads"][state["sizes"] > 0]
    following[state["has_successor"]] = state["successors"]
    return following


def assert_equal(got: Batch, expected: Batch) -> None:
    for name, a, b in zip(Batch._fields, got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}")


def draw(seed: int, number: int, index: int, bound: int) -> int:
    """Lemire's bounded integer from Philox blocks, in plain integers."""
    for attempt in range(2**32):
        low, high = number % 2**32, number >> 32
        word = _core.philox4x32((low, high, index, attempt), (seed % 2**32, seed >> 32))[0]
        if word * bound % 2**32 >= 2**32 % bound:
            return word * bound >> 32
    raise AssertionError


class ReplayMachine(RuleBasedStateMachine):
    """Any mix of adds, ends, jumps, wraps, samples, refusals and restores, against the list of tuples."""

    @initialize(
        capacity=st.integers(1, 7),
        task_ids=st.sampled_from([[0], [0, 0], [0, 1], [1, 0, 1], [2, 0, 1, 0, 0]]),
        seed=st.integers(0, 2**64 - 1),
    )
    def start(self, capacity: int, task_ids: list[int], seed: int) -> None:
        self.feed = Feed(capacity, task_ids, seed)

    @rule(data=st.data(), steps=st.integers(1, 4))
    def add(self, data: st.DataObject, steps: int) -> None:
        for _ in range(steps):
            names = st.lists(st.integers(0, len(self.feed.task_ids) - 1), unique=True)
            streams = data.draw(names)
            jumps = [data.draw(st.booleans()) for _ in streams]
            ends = [data.draw(st.sampled_from(ENDS)) for _ in streams]
            self.feed.add(streams, jumps, ends)

    @rule(num_batches=st.integers(1, 3), data=st.data())
    def sample(self, num_batches: int, data: st.DataObject) -> None:
        if self.feed.rows():
            self.feed.check_sample(data.draw(st.integers(1, len(self.feed.rows()))), num_batches)

    @rule(capacity=st.integers(1, 9) | st.none())
    def restore(self, capacity: int | None) -> None:
        """Into another buffer that is not empty, of the same capacity or another one."""
        state = self.feed.buffer.state_dict()
        self.feed.resize(capacity or self.feed.capacity)
        self.feed.trim()
        self.feed.buffer = self.feed.empty_buffer(seed=1)
        streams = list(range(len(self.feed.task_ids)))
        for end in ENDS:
            self.feed.buffer.add(**self.feed.arguments(streams, [True] * len(streams), [end] * len(streams)))
        self.feed.buffer.load_state_dict(state)

    @rule(field=st.sampled_from(["observations", "actions", "rewards", "successors"]))
    def refused(self, field: str) -> None:
        streams = list(range(len(self.feed.task_ids)))
        added = self.feed.arguments(streams, [True] * len(streams), [ENDS[1]] * len(streams))
        added[field].flat[-1] = np.nan
        with pytest.raises(ValueError, match=field):
            self.feed.buffer.add(**added)

    @invariant()
    def content(self) -> None:
        if hasattr(self, "feed"):
            self.feed.check_content()


TestReplayMachine = ReplayMachine.TestCase
TestReplayMachine.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


def filled(capacity: int = 5, task_ids: tuple[int, ...] = (0, 1, 0), steps: int = 9, seed: int = 3) -> Feed:
    """A buffer whose rings have wrapped, with ends and jumps in it."""
    feed = Feed(capacity, list(task_ids), seed)
    for step in range(steps):
        ends = [ENDS[(step + stream) % 5 % 4] for stream in range(len(task_ids))]
        feed.add(jumps=[(step + stream) % 3 == 0 for stream in range(len(task_ids))], ends=ends)
    return feed


@pytest.mark.parametrize("capacity", [1, 2, 3, 7])
@pytest.mark.parametrize("task_ids", [(0,), (0, 0), (1, 0, 0)])
def test_small_and_odd_capacities_wrap_and_restore(capacity: int, task_ids: tuple[int, ...]) -> None:
    for steps in range(3 * capacity + 2):
        feed = filled(capacity, task_ids, steps)
        feed.check_content()
        if feed.rows():
            feed.check_sample(len(feed.rows()), 2)


def test_the_successor_never_comes_from_another_episode_or_stream() -> None:
    """Not even where the caller starts another episode without having said that one ended."""
    buffer = ReplayBuffer(100, 1, 1, task_ids=[0, 0, 0])
    for step in range(30):
        places = 1000 * np.arange(3) + 100 * (step // 10) + step % 10
        observations = places.astype(np.float32)[:, None]
        flags = np.zeros(3, bool)
        buffer.add(
            observations, np.zeros((3, 1), np.float32), observations[:, 0], flags, flags, observations + 1
        )
    batch = buffer.sample(90, 20)
    assert torch.equal(batch.next_observations, batch.observations + 1)
    assert len(batch.observations.unique()) == 90


def test_a_successor_that_differs_only_in_the_sign_of_zero_is_kept() -> None:
    buffer = ReplayBuffer(4, 1, 1)
    for observation in (1.0, 0.0):
        buffer.add(**one(observations=[[observation]], successors=[[-0.0]]))
    state = buffer.state_dict()
    assert np.signbit(state["successors"]).tolist() == [[True]]
    assert np.signbit(state["observations"]).tolist() == [[False], [False]]


def test_a_time_limit_keeps_mask_one_and_an_end_gives_zero() -> None:
    buffer = ReplayBuffer(4, 1, 1, task_ids=[0] * 4)
    terminated, truncated = np.array(ENDS).T
    columns = np.zeros((4, 1), np.float32)
    buffer.add(columns, columns, np.arange(4, dtype=np.float32), terminated, truncated, columns)
    batch = buffer.sample(4, 20)
    assert torch.equal(batch.masks, torch.tensor([1.0, 0.0, 1.0, 0.0])[batch.rewards.long()])


@pytest.mark.parametrize("task_ids", [(0, 1, 2), (0, 1, 1)])
@pytest.mark.parametrize("extra", [0, 1, 13])
def test_every_stored_transition_is_equally_likely(task_ids: tuple[int, ...], extra: int) -> None:
    """Also just after a wrap, with the oldest and the newest row, and with rings of different sizes."""
    feed = Feed(30, list(task_ids), seed=5)
    for _ in range(30 + extra):
        feed.add()
    feed.add([1])
    rows = np.array([row[2] for _, row in feed.rows()])
    sampled = feed.buffer.sample(50, 1000).rewards.numpy()
    counts = [np.count_nonzero(sampled == reward) for reward in rows]
    assert sum(counts) == 50_000
    assert chisquare(counts).pvalue > 1e-3


def test_equal_seeds_give_equal_draws_and_others_differ() -> None:
    first, same, other = (filled(seed=seed).buffer.sample(7, 9) for seed in (3, 3, 4))
    assert_equal(first, same)
    assert not torch.equal(first.rewards, other.rewards)


def test_several_batches_at_once_are_the_batches_of_single_calls() -> None:
    together, apart = filled().buffer, filled().buffer
    batches = together.sample(6, 4)
    for u in range(4):
        assert_equal(batches.update(u), apart.sample(6).update(0))
    assert together.draws == apart.draws == 4
    shorter = filled().buffer.sample(3, 4)
    assert torch.equal(shorter.observations, batches.observations[:, :3])
    assert [field.dtype for field in batches] == [torch.float32] * 5 + [torch.int64]


def test_each_sample_is_in_fresh_memory_whatever_the_default_dtype() -> None:
    buffer = filled().buffer
    torch.set_default_dtype(torch.float64)
    try:
        first = buffer.sample(6)
    finally:
        torch.set_default_dtype(torch.float32)
    kept = first.observations.clone()
    buffer.sample(6)
    assert torch.equal(first.observations, kept)


def test_a_restored_buffer_goes_on_exactly_as_one_that_was_never_saved() -> None:
    feed = filled(steps=11)
    feed.check_sample(4, 3)
    restored = feed.empty_buffer(seed=99)
    restored.load_state_dict(feed.buffer.state_dict())
    for _ in range(8):
        added = feed.arguments([2, 0], [False, True], [ENDS[0], ENDS[1]])
        restored.add(**added)
        feed.buffer.add(**added)
        feed.remember(added)
        assert_equal(restored.sample(5, 2), feed.buffer.sample(5, 2))
    for name, value in feed.buffer.state_dict().items():
        np.testing.assert_array_equal(restored.state_dict()[name], value, err_msg=name)


def test_torch_tensors_and_strided_arrays_are_stored_like_numpy_arrays() -> None:
    feed, twin = filled(), filled()
    added = feed.arguments([0, 1], [True, False], [ENDS[0], ENDS[1]])
    feed.buffer.add(**{name: torch.tensor(value) for name, value in added.items()})
    twin.buffer.add(**{name: np.repeat(value, 2, axis=0)[::2] for name, value in added.items()})
    feed.remember(added)
    feed.check_content()
    assert_equal(feed.buffer.sample(6), twin.buffer.sample(6))


def test_capacity_is_per_task_and_rounded_up_per_stream() -> None:
    buffer = ReplayBuffer(10, O, A, task_ids=[0, 0, 0, 1])
    assert buffer.capacity == 10
    assert buffer.capacity_per_task.tolist() == [12, 10]
    assert (len(buffer), buffer.num_streams, buffer.size_per_task.tolist()) == (0, 4, [0, 0])


@pytest.mark.parametrize("streams", [1, 64])
def test_memory_is_at_most_062_of_storing_every_observation_twice(streams: int) -> None:
    buffer = ReplayBuffer(1_000_000, 67, 24, task_ids=[0] * streams)
    twice = 1_000_000 * (2 * 67 + 24 + 2) * 4
    assert 0.5 * twice < buffer.nbytes <= 0.62 * twice


def test_freed_side_slots_are_used_again() -> None:
    feed = filled(capacity=100, task_ids=(0,), steps=150)
    before = feed.buffer.nbytes
    for _ in range(300):
        feed.add(ends=[ENDS[1]])
    assert feed.buffer._store.side_size == 100
    assert feed.buffer.nbytes == before


def test_calls_from_several_threads_run_one_after_the_other() -> None:
    buffer = ReplayBuffer(64, 1, 1, task_ids=[0] * 8)
    value = np.zeros((8, 1), np.float32)
    flags = np.zeros(8, bool)
    buffer.add(value, value, value[:, 0], flags, flags, value + 1)

    def add() -> None:
        for step in range(2000):
            at = value + 2 * step
            buffer.add(at, at, at[:, 0], flags, flags, at + 1)

    thread = threading.Thread(target=add)
    thread.start()
    while thread.is_alive():
        batch = buffer.sample(8, 4)
        assert torch.equal(batch.next_observations, batch.observations + 1)
        assert torch.equal(batch.rewards, batch.actions[..., 0])
    thread.join()
    assert len(buffer) == 64


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


def one(**changes: Any) -> dict[str, Any]:
    """A transition of one stream with O = A = 1."""
    added: dict[str, Any] = {
        "observations": [[1.0]],
        "actions": [[0.5]],
        "rewards": [1.0],
        "terminated": [False],
        "truncated": [False],
        "successors": [[2.0]],
        **changes,
    }
    return {
        name: np.array(value, bool if isinstance(value[0], bool) else np.float32)
        if isinstance(value, list)
        else value
        for name, value in added.items()
    }


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"observations": np.ones((1, 1))},
            TypeError,
            "observations must be float32, got float64; convert it with",
        ),
        (
            {"actions": torch.ones(1, 1).half()},
            TypeError,
            r"got float16; convert it with .to\(torch.float32\)",
        ),
        ({"terminated": np.zeros(1, np.uint8)}, TypeError, "terminated must be bool, got uint8"),
        ({"rewards": 1.0}, TypeError, "rewards must be a torch tensor or a numpy array, got float"),
        ({"rewards": torch.ones(1, device="meta")}, TypeError, "rewards must be on the CPU, got meta"),
        ({"streams": np.zeros(1, np.int32)}, TypeError, "streams must be int64, got int32"),
        ({"observations": [[1.0, 2.0]]}, ValueError, r"must have shape \[M, O\] = \[1, 1\], got \[1, 2\]"),
        ({"rewards": [[1.0]]}, ValueError, r"rewards must have shape \[M\] = \[1\], got \[1, 1\]"),
        ({"actions": [1.0]}, ValueError, r"actions must have shape \[M, A\] = \[1, 1\], got \[1\]"),
        ({"streams": np.array([1])}, ValueError, r"streams must lie in 0..0, got 1"),
        ({"streams": np.array([-1])}, ValueError, r"streams must lie in 0..0, got -1"),
        (
            {"streams": np.zeros((1, 1), np.int64)},
            ValueError,
            r"must have shape \[M\] = \[any\], got \[1, 1\]",
        ),
        (
            {"observations": [[np.nan]]},
            ValueError,
            r"observations of stream 0 \(task 0\) must be finite, got nan",
        ),
        ({"actions": [[np.inf]]}, ValueError, r"actions of stream 0 \(task 0\) must be finite, got inf"),
        ({"rewards": [-np.inf]}, ValueError, r"rewards of stream 0 \(task 0\) must be finite, got -inf"),
        (
            {"successors": [[np.nan]]},
            ValueError,
            r"successors of stream 0 \(task 0\) must be finite, got -?nan",
        ),
    ],
)
def test_a_refused_transition_changes_nothing(changes: dict[str, Any], error: type, message: str) -> None:
    buffer = ReplayBuffer(4, 1, 1)
    buffer.add(**one())
    before = buffer.state_dict()
    with pytest.raises(error, match=message):
        buffer.add(**one(**changes))
    for name, value in buffer.state_dict().items():
        np.testing.assert_array_equal(value, before[name])


def test_a_stream_named_twice_is_refused_and_the_message_names_stream_and_task() -> None:
    feed = filled(task_ids=(0, 1, 0))
    added = feed.arguments([1, 2, 1], [True] * 3, [ENDS[0]] * 3)
    with pytest.raises(ValueError, match="streams must differ, got 1 twice"):
        feed.buffer.add(**added)
    added = feed.arguments([2, 1], [True] * 2, [ENDS[0]] * 2)
    added["successors"][1, 2] = np.nan
    with pytest.raises(
        ValueError, match=r"successors of stream 1 \(task 1\) must be finite.*nothing was stored"
    ):
        feed.buffer.add(**added)
    feed.check_content()


def test_a_batch_larger_than_the_store_is_refused() -> None:
    feed = filled()
    stored = len(feed.buffer)
    with pytest.raises(
        ValueError, match=f"batch_size 256 exceeds the {stored} transitions stored; collect more or"
    ):
        feed.buffer.sample(256)
    with pytest.raises(ValueError, match="batch_size 1 exceeds the 0 transitions stored"):
        feed.empty_buffer(0).sample(1)
    for sizes in [(0, 1), (1, 0), (-1, 1)]:
        with pytest.raises(ValueError, match="must be at least 1"):
            feed.buffer.sample(*sizes)
    assert feed.buffer.draws == 0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"capacity": 0}, ValueError, "capacity must be at least 1, got 0"),
        ({"observation_size": -1}, ValueError, "observation_size must be at least 1, got -1"),
        ({"action_size": 0}, ValueError, "action_size must be at least 1, got 0"),
        ({"task_ids": []}, ValueError, r"task_ids must have shape \[N\] with N >= 1, got \[0\]"),
        ({"task_ids": [0.0]}, TypeError, "task_ids must be integers, got float64"),
        ({"task_ids": [0, -1]}, ValueError, r"task_ids of 2 streams must lie in 0..1, got -1"),
        ({"task_ids": [0, 2]}, ValueError, r"task_ids of 2 streams must lie in 0..1, got 2"),
        ({"task_ids": [0, 2, 2]}, ValueError, r"task_ids must name every task of 0..2, but none is 1"),
        ({"seed": -1}, ValueError, r"seed must lie in 0..2\*\*64-1, got -1"),
        ({"capacity": 2**29}, ValueError, "needs 536870913 rows, and a store has at most 536870912"),
        ({"capacity": 2**28, "observation_size": 2**20}, MemoryError, "268435457 rows of 4194368 bytes"),
    ],
)
def test_a_buffer_that_cannot_be_is_refused(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        ReplayBuffer(**{"capacity": 4, "observation_size": 1, "action_size": 1, **arguments})


def changed(state: dict[str, np.ndarray], name: str, index: Any, value: Any) -> dict[str, np.ndarray]:
    copy = state[name].copy()
    copy[index] = value
    return {**state, name: copy}


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("heads", lambda s: {k: v for k, v in s.items() if k != "heads"}, "the replay state lacks heads"),
        ("extra", lambda s: {**s, "extra": s["seed"]}, "unknown keys: extra"),
        (
            "size",
            lambda s: changed(s, "observation_size", (), 4),
            "observation_size of the replay state must be 3",
        ),
        (
            "tasks",
            lambda s: changed(s, "task_ids", 1, 0),
            r"task_ids of the replay state must be \[0, 1, 0\], got",
        ),
        (
            "streams",
            lambda s: {**s, "task_ids": s["task_ids"][:2]},
            r"task_ids must have shape \[N\] = \[3\]",
        ),
        (
            "rows",
            lambda s: {**s, "observations": s["observations"][1:]},
            r"observations must have shape \[n, O\]",
        ),
        ("side", lambda s: {**s, "successors": s["successors"][1:]}, r"successors must have shape \[m, O\]"),
        ("sum", lambda s: changed(s, "sizes", 0, s["sizes"][0] + 1), "must sum to the 11 rows of rewards"),
        (
            "short",
            lambda s: changed(s, "sizes", 2, s["sizes"][2] - 1),
            "must sum to the 11 rows of rewards",
        ),
        ("negative", lambda s: changed(s, "sizes", 1, -1), "sizes must not be negative"),
        (
            "head",
            lambda s: changed(s, "head_valid", 0, not s["head_valid"][0]),
            "head_valid of stream 0 must be",
        ),
        (
            "end",
            lambda s: changed(s, "truncated", ~s["has_successor"], True),
            "has_successor of row .* must be set",
        ),
        (
            "nan",
            lambda s: changed(s, "observations", (2, 1), np.nan),
            "observations of row 2 must be finite, got nan",
        ),
    ],
)
def test_a_state_that_does_not_fit_is_refused_and_changes_nothing(
    name: str, change: Any, message: str
) -> None:
    feed = filled()
    state = feed.buffer.state_dict()
    with pytest.raises(ValueError, match=message):
        feed.buffer.load_state_dict(change(state))
    feed.check_content()
    feed.check_sample(5, 2)


def test_the_binding_refuses_arrays_that_do_not_fit_the_store() -> None:
    store = filled().buffer._store
    floats, short, ids = (
        np.zeros((1, 4), np.float32),
        np.zeros((1, 3), np.float32),
        np.zeros((1, 4), np.int64),
    )
    with pytest.raises(ValueError, match="observations must hold 12 values, got 4"):
        store.sample(floats, floats, floats, floats, floats, ids)
    flags = np.zeros(1, bool)
    with pytest.raises(ValueError, match="observations must hold 3 values, got 4"):
        store.add(ids[0, :1], floats, short[:, :2].copy(), short[0, :1], flags, flags, short)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        store.sample(short.astype(np.float64), short, short, short, short, ids)
    with pytest.raises(IndexError, match="age must lie below 3, got 3"):
        store.read(0, 3, short, short[:, :2].copy(), short[0, :1], short[0, :1], short, ids[0, :1])
