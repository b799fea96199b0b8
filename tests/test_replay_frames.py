"""Stacked frames, dtypes, shapes and further fields of the replay buffer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require

from brc_fast import Batch
from brc_fast.replay import Field, ReplayBuffer

require("hypothesis")

from refusals import says
from replay_oracle import ENDS, Feed, arrays_of, assert_same, assert_same_batch, filled, more, read_all

DTYPES = ["float32", "float16", "bfloat16", "uint8", "int8", "int16", "int32", "int64", "bool"]
FLOATS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def test_a_stack_begins_with_its_episode_and_goes_on_to_the_true_successor() -> None:
    buffer = ReplayBuffer(10, Field((), "uint8", stack=3), 1)
    places = [10, 11, 12, 20, 21, 30, 31]  # an end after 12, a jump from 21 to 30
    for place in places:
        end = np.array([place == 12])
        reward = np.full(1, place, np.float32)
        frame = np.array([place], np.uint8)
        buffer.add(frame, reward[:, None], reward, end, np.zeros(1, bool), frame + np.uint8(1))
    got = read_all(buffer)
    assert got["observations"].tolist() == [
        [10, 10, 10],
        [10, 10, 11],
        [10, 11, 12],
        [20, 20, 20],
        [20, 20, 21],
        [30, 30, 30],
        [30, 30, 31],
    ]
    assert got["next_observations"].tolist() == [
        [10, 10, 11],
        [10, 11, 12],
        [11, 12, 13],
        [20, 20, 21],
        [20, 21, 22],
        [30, 30, 31],
        [30, 31, 32],
    ]
    several = read_all(buffer, 2, 0.5)
    assert several["next_observations"][:3].tolist() == [[10, 11, 12], [11, 12, 13], [11, 12, 13]]
    assert several["rewards"].tolist() == [15.5, 17, 12, 30.5, 21, 45.5, 31]


def test_after_a_wrap_the_oldest_transition_has_its_older_frames_still() -> None:
    buffer = ReplayBuffer(3, Field((), "int64", stack=4), 1)
    no = np.zeros(1, bool)
    for place in range(20):
        reward = np.full(1, place, np.float32)
        buffer.add(np.array([place]), reward[:, None], reward, no, no, np.array([place + 1]))
        oldest = read_all(buffer)["observations"][0].tolist()
        first = max(place - 2, 0)
        assert oldest == [max(frame, 0) for frame in range(first - 3, first + 1)]


@pytest.mark.parametrize("stack", [1, 2, 4, 70])
@pytest.mark.parametrize("capacity", [1, 2, 5, 8])
def test_stacks_are_those_of_the_whole_episode_before_and_after_wraps(stack: int, capacity: int) -> None:
    feed = Feed(capacity, (0, 1, 0), Field((2, 2), "uint8", stack=stack), seed=4)
    for _ in range(4 * capacity):
        more(feed, 1)
        for n_step in (1, 2, 5):
            feed.check_content(n_step, 0.9)
            feed.check_sample(len(feed.stored()), 2, n_step=n_step, discount=0.9)


@pytest.mark.parametrize("stack", [2, 4])
@pytest.mark.parametrize("steps", [3, 7, 8, 23])
def test_stacks_stay_true_through_loads_into_other_capacities(stack: int, steps: int, tmp_path: Path) -> None:
    """Episodes are longer than the rings, so that the oldest frames lie before the oldest transition."""
    feed = Feed(7, (0, 0), Field((3,), "int32", stack=stack))
    for step in range(steps):
        feed.add(ends=[ENDS[step % 11 == 10], ENDS[0]])
    for i, capacity in enumerate([7, 30, 3, 1, 9, 9, 30]):
        feed.buffer.save(tmp_path / str(i))
        feed = feed.loaded(tmp_path / str(i), capacity)
        feed.check_content(3, 0.9)
        for _ in range(i + 1):
            feed.add()
            feed.check_content(1)
        feed.check_sample(2, 3, n_step=3, discount=0.9)


def test_a_stack_takes_the_memory_of_one_frame_per_transition() -> None:
    one, four = (ReplayBuffer(2000, Field((84, 84), "uint8", stack=stack), 1) for stack in (1, 4))
    assert four.nbytes <= one.nbytes + 4 * (84 * 84 + 128) + 2**21


@pytest.mark.parametrize("shape", [(), (5,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_and_rank_comes_back_bit_for_bit(
    dtype: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    feed = Feed(
        5,
        (0, 1),
        Field(shape, dtype, stack=2),
        Field(shape[1:], dtype),
        {"cost": Field((), dtype), "plan": Field((3,), dtype)},
        seed=2,
    )
    more(feed, 9)
    feed.check_content(2, 0.5)
    batch = feed.check_sample(6, 2)
    assert list(batch.observations.shape) == [2, 6, 2, *shape]
    assert list(batch.actions.shape) == [2, 6, *shape[1:]]
    assert list(batch.extras["plan"].shape) == [2, 6, 3]
    for value in (
        batch.observations,
        batch.actions,
        batch.next_observations,
        batch.extras["cost"],
        batch.extras["plan"],
    ):
        assert value.dtype == getattr(torch, dtype)
    feed.buffer.save(tmp_path)
    loaded = feed.loaded(tmp_path)
    more(loaded, 3)
    loaded.check_content(2, 0.5)


def test_every_pattern_of_bits_is_kept_where_it_is_allowed() -> None:
    """All of 16 bits, as float16 and as bfloat16, in observations, actions, successors and extras."""
    patterns = np.arange(2**16, dtype=np.uint16).reshape(64, 1, 1024)
    for dtype in ("float16", "bfloat16"):
        field = Field((1024,), dtype)
        buffer = ReplayBuffer(64, field, field, extras={"more": field}, non_finite="allow")
        no = np.zeros(1, bool)
        for row in patterns:
            value = torch.from_numpy(row).view(FLOATS[dtype])
            buffer.add(value, value, np.zeros(1, np.float32), no, no, value, extras={"more": value})
        for name, column in read_all(buffer).items():
            if name in ("observations", "next_observations", "actions", "more"):
                np.testing.assert_array_equal(column.view(np.uint16), patterns[:, 0], err_msg=name)


@pytest.mark.parametrize("dtype", list(FLOATS))
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("size", [1, 7, 33])
def test_values_that_are_not_finite_are_refused_in_every_float_dtype(
    dtype: str, value: float, size: int
) -> None:
    field = Field((size,), dtype)
    feed = Feed(3, (0, 0), field, field, {"cost": field})
    feed.add()
    for name in ("observations", "actions", "cost", "successors"):
        added = feed.arguments([0, 1], [True, True], [ENDS[0], ENDS[0]])
        column = added["extras"][name] if name == "cost" else added[name]
        column[1, size - 1] = (
            torch.tensor([value]).to(FLOATS[dtype]).view(torch.uint8).numpy().view(column.dtype)[0]
        )
        with pytest.raises(ValueError, match=f"^{name} of stream 1 .task 0. must be finite, got -?{value}"):
            feed.give(added, feed.buffer)
    feed.check_content()


def test_the_largest_finite_values_are_not_taken_for_infinite() -> None:
    for dtype, torch_dtype in FLOATS.items():
        buffer = ReplayBuffer(4, Field((3,), dtype), 1)
        finite = torch.finfo(torch_dtype)
        value = torch.tensor([[finite.max, finite.min, finite.tiny]], dtype=torch_dtype)
        zero = torch.zeros(1, 1)
        buffer.add(value, zero, zero[0], zero[0] > 0, zero[0] > 0, value)
        assert torch.equal(buffer.sample(1).observations, value)


def test_numpy_arrays_of_bfloat16_are_stored_like_tensors() -> None:
    require("jax")
    import ml_dtypes

    field = Field((4,), "bfloat16")
    buffer = ReplayBuffer(4, field, field)
    value = np.array([[1.5, -2.0, 0.1, 3e38]], ml_dtypes.bfloat16)
    no = np.zeros(1, bool)
    buffer.add(value, value, np.zeros(1, np.float32), no, no, value)
    assert torch.equal(buffer.sample(1).actions, torch.tensor(value.astype(np.float32)).bfloat16())


def test_a_discrete_action_keeps_all_of_64_bits() -> None:
    buffer = ReplayBuffer(3, 1, Field((), "int64"))
    frame, no = np.zeros((1, 1), np.float32), np.zeros(1, bool)
    for action in (2**63 - 1, -(2**63), 2**53 + 1):
        buffer.add(frame, np.array([action]), frame[0], no, no, frame)
    assert read_all(buffer)["actions"].tolist() == [2**63 - 1, -(2**63), 2**53 + 1]


TOLD = ["terminated", "truncated", "steps", "indices"]


def with_extras() -> Feed:
    extras = {"log_probability": Field(), "goal": Field((2,), "float16"), "skill": Field((), "uint8")}
    return filled(extras=extras)


def test_extras_come_by_name_and_stay_with_the_batch() -> None:
    feed = with_extras()
    batch = feed.check_sample(4, 3)
    assert list(batch.extras) == [*TOLD, "log_probability", "goal", "skill"]
    assert len(batch) == 7
    one = batch.update(2)
    for name, value in batch.extras.items():
        assert torch.equal(one.extras[name], value[2])
        assert torch.equal(batch.to("cpu").extras[name], value)
        assert torch.equal(batch._replace(rewards=batch.rewards * 2).extras[name], value)
        assert torch.equal(batch.map(torch.clone).extras[name], value)
        assert torch.equal(batch._replace(extras={name: value}).extras[name], value)
        assert batch.numpy()[name].ctypes.data == value.data_ptr()
    assert torch.equal(batch._replace(rewards=batch.rewards * 2).rewards, batch.rewards * 2)
    assert isinstance(one, Batch)
    assert list(filled().buffer.sample(1).extras) == TOLD


def test_the_order_of_extras_in_a_call_does_not_matter() -> None:
    feed, twin = with_extras(), with_extras()
    added = feed.arguments([0, 1, 2], [False] * 3, [ENDS[0]] * 3)
    feed.buffer.add(**added)
    twin.buffer.add(**{**added, "extras": dict(reversed(added["extras"].items()))})
    assert_same(read_all(feed.buffer), read_all(twin.buffer))
    assert_same_batch(feed.buffer.sample(7, 2), twin.buffer.sample(7, 2))


WANTED = "extras must hold ['goal', 'log_probability', 'skill']"


@pytest.mark.parametrize(
    ("extras", "error", "words"),
    [
        (None, ValueError, f"{WANTED}, got []"),
        ({"skill": None}, ValueError, f"{WANTED}, got ['goal', 'log_probability']"),
        ({"other": 1}, ValueError, f"{WANTED}, got ['goal', 'log_probability', 'other', 'skill']"),
        ({"skill": 1}, ValueError, "skill ... [M, ...] = [3], got []"),
        ({"skill": np.full(3, 300)}, TypeError, "skill must be uint8, which does not hold 300, got as int64"),
        ({"skill": np.zeros((3, 1), np.uint8)}, ValueError, "skill ... [3], got [3, 1]"),
        ({"goal": np.zeros((2, 2), np.float16)}, ValueError, "goal ... [3, 2], got [2, 2]"),
        ({"goal": np.full((3, 2), np.inf, np.float16)}, ValueError, "goal of stream 0 ... finite, got inf"),
    ],
)
def test_extras_that_do_not_fit_are_refused(extras: Any, error: type[Exception], words: str) -> None:
    feed = with_extras()
    added = feed.arguments([0, 1, 2], [False] * 3, [ENDS[0]] * 3)
    given = None if extras is None else {**added["extras"], **extras}
    if given is not None:
        given = {name: value for name, value in given.items() if value is not None}
    with pytest.raises(error, match=says(words)):
        feed.buffer.add(**{**added, "extras": given})
    feed.check_content()


def test_a_field_is_named_in_several_ways() -> None:
    assert Field(3) == Field((3,)) == Field([3], "float32") == Field((np.int64(3),), np.float32)
    for name in ("uint8", "int64", "float16", "bool"):
        assert Field((), name) == Field((), getattr(torch, name)) == Field((), np.dtype(name))
    assert Field((), bool) == Field((), "bool")
    assert Field((), torch.bfloat16).torch_dtype == torch.bfloat16
    plain, named = ReplayBuffer(4, 3, (2, 1)), ReplayBuffer(4, Field((3,)), Field((2, 1)))
    assert plain.schema.describe() == named.schema.describe()


def test_the_numpy_view_refuses_bfloat16_and_shares_memory_of_the_rest() -> None:
    feed = filled(action=Field((2,), "bfloat16"))
    batch = feed.buffer.sample(3)
    with pytest.raises(TypeError, match="BFloat16"):
        batch.numpy()
    assert arrays_of(batch)["actions"].dtype == np.uint16
