"""What people rely on in the replay buffers of SB3, tianshou, cpprb and TorchRL, asked of this one.

Every observation is the number of its step, so that a transition t leads to t + 1.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch

from brc_fast.batch import Batch
from brc_fast.replay import DeviceReplayBuffer, Field, ReplayBuffer

KINDS = [ReplayBuffer, functools.partial(DeviceReplayBuffer, device="cpu")]
GAMMA = 0.5


def walk(
    buffer: Any,
    steps: int,
    ends: Mapping[int, str] | None = None,
    first: int = 0,
    streams: list[int] | None = None,
) -> None:
    """Steps `first` ... of every stream. After an end, 100 steps further another episode begins, so that the
    step after a last one is told from the first of the next."""
    at = first
    for step in range(first, first + steps):
        end = (ends or {}).get(step, "")
        n = len(streams) if streams else buffer.num_streams
        row = np.full((n, 1), at, np.float32)
        flags = np.full(n, "terminated" in end), np.full(n, "truncated" in end)
        buffer.add(row, -row, row[:, 0], *flags, row + 1, None if streams is None else np.array(streams))
        at += 101 if end else 1


def steps_of(batch: Batch) -> list[int]:
    return batch.observations.flatten().to(torch.int64).tolist()


def by_step(batch: Batch) -> dict[int, tuple[float, float, float, int]]:
    """What each step was summed to: reward, mask, successor and number of steps."""
    columns = (batch.rewards, batch.masks, batch.next_observations, batch.steps)
    rows = zip(*(column.flatten().tolist() for column in columns), strict=True)
    return dict(zip(steps_of(batch), rows, strict=True))


def summed(buffer: Any, n_step: int) -> dict[int, tuple[float, float, float, int]]:
    return by_step(buffer.sample(len(buffer), 60, n_step=n_step, discount=GAMMA))


def window(*rewards: float, mask: float = -1.0, led: float = -1.0) -> tuple[float, float, float, int]:
    """Of steps that followed each other: of the last one the mask and successor unless they are given."""
    total = sum(GAMMA**i * reward for i, reward in enumerate(rewards))
    mask = GAMMA ** (len(rewards) - 1) if mask < 0 else mask
    return total, mask, rewards[-1] + 1 if led < 0 else led, len(rewards)


# ---- SB3


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("capacity", "envs", "kept"), [(10, 1, 10), (12, 4, 12), (10, 3, 12), (2, 3, 3)])
def test_environments_share_the_capacity_and_none_of_it_is_lost(
    kind: Any, capacity: int, envs: int, kept: int
) -> None:
    """SB3 rounds down, 9 of 10 with 3 environments; here it is rounded up."""
    buffer = kind(capacity, 1, 1, task_ids=[0] * envs)
    assert buffer.capacity_per_task.tolist() == [kept]
    walk(buffer, 25)
    assert len(buffer) == kept
    each = kept // envs
    assert sorted(steps_of(buffer.all())) == sorted(list(range(25 - each, 25)) * envs)


@pytest.mark.parametrize("kind", KINDS)
def test_a_time_limit_is_no_end_of_returns(kind: Any) -> None:
    """handle_timeout_termination, without a choice: both flags are there, and the mask is of the first."""
    buffer = kind(50, 1, 1)
    walk(buffer, 9, {2: "truncated", 5: "terminated", 7: "terminated truncated"})
    rows = buffer.all()
    assert rows.masks.tolist() == [1, 1, 1, 1, 1, 0, 1, 0, 1]
    assert rows.truncated.tolist() == [step in (2, 7) for step in range(9)]
    assert rows.terminated.tolist() == [step in (5, 7) for step in range(9)]
    assert torch.equal(rows.next_observations, rows.observations + 1)


def test_observations_by_name_stay_together() -> None:
    buffer = ReplayBuffer(8, {"image": Field((2, 2), "uint8"), "state": 3}, 1, task_ids=[0, 0])
    for step in range(11):
        image = np.full((2, 2, 2), step, np.uint8)
        state = np.full((2, 3), step, np.float32)
        row = {"image": image, "state": state}, [[0.0], [0.0]], [0.0, 0.0], [False] * 2, [False] * 2
        buffer.add(*row, {"image": image + 1, "state": state + 1})
    batch = buffer.sample(8, 20)
    assert batch.observations["image"].dtype == torch.uint8
    for column, more in ((batch.observations, 0), (batch.next_observations, 1)):
        assert torch.equal(column["image"].flatten(2)[..., :3].float(), column["state"])
        assert set(column["state"].flatten().tolist()) == {float(step + more) for step in range(7, 11)}


@pytest.mark.parametrize("kind", KINDS)
def test_several_steps_stop_at_an_end_and_go_on_after_it_alone(kind: Any) -> None:
    buffer = kind(50, 1, 1)
    walk(buffer, 8, {2: "truncated", 5: "terminated"})
    assert summed(buffer, 3) == {
        0: window(0, 1, 2),
        1: window(1, 2),
        2: window(2),
        103: window(103, 104, 105, mask=0.0),
        104: window(104, 105, mask=0.0),
        105: window(105, mask=0.0),
        206: window(206, 207),
        207: window(207),
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", range(6, 20))
def test_several_steps_never_cross_the_write_head(kind: Any, steps: int) -> None:
    """Over every place of the head in a ring of 6: the newest steps have fewer, and the oldest do not follow
    them."""
    buffer = kind(6, 1, 1)
    walk(buffer, steps)
    assert summed(buffer, 3) == {
        step: window(*range(step, min(step + 3, steps))) for step in range(steps - 6, steps)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_sampling_several_steps_leaves_no_trace(kind: Any) -> None:
    """SB3 marks the newest transition as truncated while it samples."""
    buffer = kind(6, 1, 1)
    walk(buffer, 9)
    before = buffer.all()
    summed(buffer, 3)
    walk(buffer, 1, first=9)
    assert summed(buffer, 3)[7] == window(7, 8, 9)
    assert torch.equal(buffer.all().truncated, before.truncated)


# ---- tianshou


def stacks(buffer: ReplayBuffer) -> dict[int, tuple[list[int], list[int]]]:
    """Of every stored step the frames that it saw and those that came of it."""
    rows = buffer.all()
    seen, led = (x.flatten(1).to(torch.int64).tolist() for x in (rows.observations, rows.next_observations))
    return {frames[-1]: (frames, after) for frames, after in zip(seen, led, strict=True)}


def framed(capacity: int, frames: int = 4, envs: int = 1) -> ReplayBuffer:
    return ReplayBuffer(capacity, Field((1,), stack=frames), 1, task_ids=[0] * envs)


def test_a_stack_repeats_the_first_frame_of_its_episode_and_has_none_of_another() -> None:
    buffer = framed(50)
    walk(buffer, 7, {1: "terminated", 5: "truncated"})
    assert stacks(buffer) == {
        0: ([0, 0, 0, 0], [0, 0, 0, 1]),
        1: ([0, 0, 0, 1], [0, 0, 1, 2]),
        102: ([102, 102, 102, 102], [102, 102, 102, 103]),
        103: ([102, 102, 102, 103], [102, 102, 103, 104]),
        104: ([102, 102, 103, 104], [102, 103, 104, 105]),
        105: ([102, 103, 104, 105], [103, 104, 105, 106]),
        206: ([206, 206, 206, 206], [206, 206, 206, 207]),
    }


@pytest.mark.parametrize("steps", range(5, 17))
def test_a_stack_at_the_rings_edge_has_the_frames_before_it(steps: int) -> None:
    """tianshou repeats the oldest frame there, whose predecessors were replaced; here they are kept."""
    buffer = framed(5)
    walk(buffer, steps)

    def frames(newest: int) -> list[int]:
        return [max(0, step) for step in range(newest - 3, newest + 1)]

    right = {step: (frames(step), frames(step + 1)) for step in range(steps - 5, steps)}
    assert stacks(buffer) == right


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [5, 6, 9, 12])
def test_the_next_transition_is_found_by_its_name_and_none_comes_after_the_newest(
    kind: Any, steps: int
) -> None:
    """tianshou's prev and next, by arithmetic on names: N apart in a stream, and cut by `starts`."""
    buffer = kind(4, 1, 1, task_ids=[0, 0])
    walk(buffer, steps, {2: "terminated"})
    names = buffer.indices()
    older = names[names + 2 <= names.max()]
    following = buffer[older + 2]
    before = buffer[older]
    goes_on = ~before.terminated
    assert torch.equal(before.next_observations[goes_on], following.observations[goes_on])
    for name in (int(names.max()) + 1, int(names.min()) - 1):
        with pytest.raises(IndexError):
            buffer[name]


@pytest.mark.parametrize("kind", KINDS)
def test_environments_that_step_in_any_mix_keep_their_own_successors(kind: Any) -> None:
    """tianshou's buffer_ids: some environments are ready, others are not."""
    buffer = kind(12, 1, 1, task_ids=[0, 0, 0])
    walk(buffer, 3, first=10, streams=[2, 0])
    walk(buffer, 4, first=500, streams=[1])
    walk(buffer, 2, first=13, streams=[2])
    rows = buffer.all()
    assert torch.equal(rows.next_observations, rows.observations + 1)
    assert (rows.indices % 3).tolist() == [0] * 3 + [1] * 4 + [2] * 4
    assert steps_of(rows) == [10, 11, 12, 500, 501, 502, 503, 11, 12, 13, 14]
    assert buffer.jumps == 0


# ---- cpprb


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [3, 4, 5, 8, 9])
def test_all_transitions_have_their_own_successors_wherever_the_ring_ends(kind: Any, steps: int) -> None:
    """cpprb with `next_of` gives the successor of another row at the edge."""
    buffer = kind(4, 1, 1)
    walk(buffer, steps, {1: "truncated", 6: "terminated"})
    rows = buffer.all()
    assert len(buffer) == min(4, steps)
    assert torch.equal(rows.next_observations, rows.observations + 1)
    assert rows.rewards.tolist() == rows.observations[:, 0].tolist()
    assert torch.equal(rows.actions, -rows.observations)


def test_a_cleared_buffer_begins_anew() -> None:
    buffer = ReplayBuffer(4, 1, 1)
    walk(buffer, 7)
    buffer.clear()
    assert len(buffer) == 0
    assert buffer.all().rewards.shape == (0,)
    with pytest.raises(ValueError, match="batch_size 1 exceeds the 0 transitions stored"):
        buffer.sample(1)
    walk(buffer, 2, first=50)
    assert steps_of(buffer.all()) == [50, 51]


@pytest.mark.parametrize(
    ("field", "shape", "dtype"),
    [
        (3, (3,), torch.float32),
        ((2, 3), (2, 3), torch.float32),
        (Field((), "int64"), (), torch.int64),
        (Field((4,), "float16"), (4,), torch.float16),
        (Field((2,), "bool"), (2,), torch.bool),
        (Field((84, 84, 3), "uint8"), (84, 84, 3), torch.uint8),
    ],
    ids=str,
)
def test_a_field_comes_back_in_the_shape_and_dtype_that_it_was_declared_with(
    field: Any, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    buffer = ReplayBuffer(4, field, field, extras={"more": field})
    value = torch.ones(1, *shape).to(dtype)
    for _ in range(6):
        buffer.add(value, value, [1.0], [False], [False], value, extras={"more": value})
    batch = buffer.sample(3)
    for column in (batch.observations, batch.actions, batch.next_observations, batch.extras["more"]):
        assert column.dtype == dtype
        assert torch.equal(column, torch.ones(3, *shape).to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_nobody_need_say_that_an_episode_is_over_for_its_last_steps_to_be_there(kind: Any) -> None:
    """cpprb holds the last steps of an episode back until on_episode_end()."""
    buffer = kind(50, 1, 1)
    walk(buffer, 2)
    assert summed(buffer, 3) == {0: window(0, 1), 1: window(1)}
    walk(buffer, 2, first=2)
    assert summed(buffer, 3)[1] == window(1, 2, 3)


# ---- TorchRL


def columns(first: int, steps: int) -> list[Any]:
    row = np.arange(first, first + steps, dtype=np.float32)[:, None]
    no = np.zeros(steps, bool)
    return [row, -row, row[:, 0], no, no, row + 1]


def test_an_extend_keeps_the_newest_of_more_than_fits_and_says_how_many_came() -> None:
    buffer = ReplayBuffer(10, 1, 1)
    assert buffer.extend(*columns(0, 7)) == 7
    assert buffer.extend(*columns(7, 25)) == 25
    assert buffer.extend(*columns(32, 0)) == 0
    assert steps_of(buffer.all()) == list(range(22, 32))
    assert buffer.jumps == 0
    assert summed(buffer, 3)[29] == window(29, 30, 31)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 2]), (True, [4, 4])])
def test_an_epoch_is_without_replacement_and_each_has_its_own_order(
    kind: Any, drop_last: bool, sizes: list[int]
) -> None:
    buffer = kind(10, 1, 1)
    walk(buffer, 13)
    epochs = []
    for seed in range(3):
        batches = list(buffer.epoch(4, drop_last=drop_last, seed=seed))
        assert [len(batch.rewards) for batch in batches] == sizes
        epochs.append([step for batch in batches for step in steps_of(batch)])
        assert len(set(epochs[-1])) == sum(sizes)
        assert set(epochs[-1]) <= set(range(3, 13))
    assert epochs[0] != epochs[1] != epochs[2]
    assert buffer.draws == 0


@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_holds_what_was_there_when_it_began(kind: Any) -> None:
    buffer = kind(20, 1, 1)
    walk(buffer, 8)
    epoch = buffer.epoch(4, shuffle=False)
    first = next(epoch)
    walk(buffer, 8, first=8)
    assert [steps_of(first), *map(steps_of, epoch)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    late = buffer.epoch(4, shuffle=False)
    next(late)
    walk(buffer, 12, first=16)
    with pytest.raises(IndexError, match="has been replaced since"):
        next(late)
