"""Several observations of a step, whole episodes and data sets, and what a batch tells of its transitions."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.utils._pytree
from extras import require
from torch.utils.data import default_collate

from brc_fast.replay import DeviceReplayBuffer, Field, ReplayBuffer

require("hypothesis")

from refusals import says
from replay_oracle import ENDS, Feed, assert_same_batch, filled, more

TWO = {"policy": Field((3,)), "critic": Field((5,))}
CAMERA = {
    "image": Field((4, 2), "uint8", stack=3),
    "velocity": Field((3,), "float16"),
    "id": Field((), "int64"),
}
DEVICE = functools.partial(DeviceReplayBuffer, device="cpu")


@pytest.mark.parametrize("parts", [TWO, CAMERA, {"only": Field((2,), stack=2)}], ids=["two", "camera", "one"])
@pytest.mark.parametrize("n_step", [1, 3])
def test_each_observation_of_a_step_has_its_own_successor(parts: Any, n_step: int, tmp_path: Path) -> None:
    feed = Feed([6, 4], (0, 1, 0), parts, extras={"cost": Field((), "bfloat16")}, seed=5)
    for _ in range(12):
        more(feed, 1)
        feed.check_content(n_step, 0.9)
        feed.check_sample(3, 2, n_step=n_step, discount=0.9)
    feed.buffer.save(tmp_path)
    for capacity in (None, [3, 9]):
        loaded = feed.loaded(tmp_path, capacity, same_capacity=capacity is None)
        loaded.check_content(n_step, 0.9)
        more(loaded, 3)
        loaded.check_content(n_step, 0.9)


@pytest.mark.parametrize("parts", [TWO, CAMERA], ids=["two", "camera"])
def test_a_device_holds_the_same_observations(parts: Any, tmp_path: Path) -> None:
    host = Feed(6, (0, 1, 0), parts, seed=5)
    device = DEVICE(6, parts, host.action, task_ids=host.task_ids, seed=5)
    more(host, 15, device)
    for request in ({}, {"n_step": 3, "discount": 0.9}, {"weights": "equal"}):
        assert_same_batch(device.sample(4, 2, **request), host.buffer.sample(4, 2, **request))
    assert_same_batch(device.all(), host.buffer.all())
    device.save(tmp_path)
    host.draws = device.draws
    host.loaded(tmp_path).check_content()


def test_names_of_observations_must_fit() -> None:
    buffer = ReplayBuffer(4, {"policy": 2, "critic": 3}, 1)
    right = {"policy": np.zeros((1, 2), np.float32), "critic": np.zeros((1, 3), np.float32)}
    plain = [np.zeros((1, 1), np.float32), [0.0], [False], [False]]
    buffer.add(right, *plain, right)
    for wrong, error, words in [
        (
            {"policy": right["policy"]},
            ValueError,
            "observations must hold ['critic', 'policy'], got ['policy']",
        ),
        (right["policy"], TypeError, "observations must be a dict with ['policy', 'critic'], got ndarray"),
        ({**right, "critic": [[0.0, 1.0]]}, ValueError, "observations['critic'] ... [1, 3], got [1, 2]"),
        (
            {**right, "critic": [[0, 0, np.nan]]},
            ValueError,
            "observations['critic'] ... must be finite, got nan",
        ),
    ]:
        with pytest.raises(error, match=says(words)):
            buffer.add(wrong, *plain, right)
    with pytest.raises(ValueError, match=says("successors of observations['critic'] ... finite, got inf")):
        buffer.add(right, *plain, {**right, "critic": np.full((1, 3), np.inf, np.float32)})
    assert len(buffer) == 1
    with pytest.raises(ValueError, match="observation_size must name at least one observation"):
        ReplayBuffer(4, {}, 1)
    with pytest.raises(ValueError, match="1 to 16 parts, got 17"):
        ReplayBuffer(4, {str(i): 1 for i in range(17)}, 1)


def test_spaces_of_gymnasium_are_fields() -> None:
    require("gym")
    from gymnasium import spaces

    box = spaces.Box(-1, 1, (3,), np.float64)
    seen = spaces.Dict(image=spaces.Box(0, 255, (4, 4, 3), np.uint8), on=spaces.MultiBinary(2), v=box)
    buffer = ReplayBuffer(4, seen, spaces.Discrete(3))
    assert buffer.schema.observation == {
        "image": Field((4, 4, 3), "uint8"),
        "on": Field((2,), "int8"),
        "v": Field((3,)),
    }
    assert buffer.schema.action == Field((), "int64")
    for _ in range(3):
        buffer.add(seen.sample(), 2, np.float64(0.1), False, np.bool_(False), seen.sample())
    assert buffer.sample(2).observations["image"].shape == (2, 4, 4, 3)
    with pytest.raises(TypeError, match="action_size must be a number of floats, a shape or a Field"):
        ReplayBuffer(4, box, spaces.Text(3))


# ---- Whole data


@pytest.mark.parametrize("observation", [Field((3,)), CAMERA, Field((70,), "uint8", stack=2)], ids=str)
@pytest.mark.parametrize("rows", [1, 17, 5000])
def test_many_rows_at_once_are_the_same_as_one_after_the_other(
    observation: Any, rows: int, tmp_path: Path
) -> None:
    capacity = [60, 4000]
    feed = Feed(capacity, (0, 1, 0), observation, seed=2)
    more(feed, 5)
    twin = feed.empty(seed=2)
    twin.load(saved(feed.buffer, tmp_path))
    for stream in (1, 0):
        parts = []
        for step in range(rows):
            ends = ENDS[step % 11 % 4] if step % 5 == 0 else ENDS[0]
            added = feed.arguments([stream], [step % 7 == 3], [ends])
            feed.give(added, feed.buffer)
            feed.remember(added)
            del added["streams"]
            parts.append(added)
        joined = torch.utils._pytree.tree_map(lambda *values: np.concatenate(values), parts[0], *parts[1:])
        twin.extend(**joined, stream=stream)
    feed.buffer, grown = twin, feed.buffer
    feed.check_content(3, 0.5)
    feed.check_sample(10, 3)
    feed.buffer = grown
    feed.draws = grown.draws
    feed.check_content()


def saved(buffer: ReplayBuffer, folder: Path) -> Path:
    buffer.save(folder)
    return folder


def test_a_data_set_with_a_fault_is_refused_whole() -> None:
    feed = filled(50, (0,), steps=10)
    rows = feed.buffer.all()
    arrays = [rows.observations, rows.actions, rows.rewards, rows.terminated, rows.truncated]
    for place, name in ((0, "observations"), (1, "actions"), (2, "rewards")):
        wrong = [value.clone() for value in arrays]
        wrong[place][-1] = float("nan")
        with pytest.raises(
            ValueError, match=says(f"{name} in row {len(rows.rewards) - 1} ... finite, got nan")
        ):
            feed.buffer.extend(*wrong, rows.next_observations)
    with pytest.raises(IndexError, match=r"stream must lie in 0\.\.0, got 1"):
        feed.buffer.extend(*arrays, rows.next_observations, stream=1)
    with pytest.raises(ValueError, match=says("actions ... [10, 2], got [9, 2]")):
        feed.buffer.extend(arrays[0], arrays[1][1:], *arrays[2:], rows.next_observations)
    feed.check_content()


@pytest.mark.parametrize("kind", [ReplayBuffer, DEVICE])
def test_a_transition_keeps_its_name_until_it_is_replaced(kind: Any) -> None:
    buffer = kind(8, 3, 2, task_ids=[0, 1, 0], seed=3)
    feed = Feed(8, (0, 1, 0), seed=3)
    more(feed, 7, buffer)
    batch = buffer.sample(6, 2)
    again = buffer[batch.indices]
    assert_same_batch(again, batch)
    assert_same_batch(buffer[batch.indices.tolist()], batch)
    one = buffer[int(batch.indices[1, 2])]
    assert torch.equal(one.observations, batch.observations[1, 2])
    assert one.rewards.shape == ()
    assert_same_batch(buffer.all(), buffer[buffer.indices()])
    oldest = int(buffer.indices()[0])
    more(feed, 1, buffer)
    with pytest.raises(IndexError, match=rf"index {oldest} has been replaced since"):
        buffer[[oldest]]
    for never in (-1, 3 * 8):
        with pytest.raises(IndexError, match=f"index {never} is of no transition that was added"):
            buffer[[never]]


@pytest.mark.parametrize("shuffle", [False, True])
def test_an_epoch_gives_every_transition_once(shuffle: bool) -> None:
    buffer = filled(50, steps=13).buffer
    batches = list(buffer.epoch(7, shuffle=shuffle, seed=1))
    names = torch.cat([batch.indices for batch in batches])
    assert [len(batch.rewards) for batch in batches] == [7] * 5 + [4]
    assert torch.equal(names.sort()[0], buffer.indices().sort()[0])
    assert torch.equal(names, buffer.indices()) is not shuffle
    assert [len(batch.rewards) for batch in buffer.epoch(7, drop_last=True)] == [7] * 5
    again = torch.cat([batch.indices for batch in buffer.epoch(7, shuffle=shuffle, seed=1)])
    assert torch.equal(again, names)


@pytest.mark.parametrize("kind", [ReplayBuffer, DEVICE])
def test_sequences_are_transitions_that_followed_each_other(kind: Any) -> None:
    buffer = kind(40, 3, 2, task_ids=[0, 1, 0], seed=3)
    feed = Feed(40, (0, 1, 0), seed=3)
    more(feed, 33, buffer)
    batch = buffer.sample_sequences(4000, 5)
    assert batch.observations.shape == (4000, 5, 3)
    assert (batch.indices.diff(dim=1) == 3).all()
    streams, numbers = batch.indices % 3, batch.indices // 3
    firsts = {(int(s), int(n)) for s, n in zip(streams[:, 0], numbers[:, 0], strict=True)}
    held = [20, 33, 20]
    assert firsts == {(s, n) for s, size in enumerate(held) for n in range(33 - size, 33 - 4)}
    for i in range(50):
        for j in range(5):
            row = feed.history[streams[i, j]][numbers[i, j]]
            before = feed.history[streams[i, j]][numbers[i, j] - 1] if numbers[i, j] > 0 else None
            oldest = numbers[i, j] == 33 - held[streams[i, j]]
            begins = before is None or before.ended or row.jumped
            assert bool(batch.extras["starts"][i, j]) == (begins or bool(oldest))
            assert batch.rewards[i, j] == row.reward
    assert buffer.draws == 1
    with pytest.raises(ValueError, match=says("length must lie in 1..33 ... got 34")):
        buffer.sample_sequences(1, 34)


@pytest.mark.parametrize("kind", [ReplayBuffer, DEVICE])
@pytest.mark.parametrize("stack", [1, 3])
def test_a_broken_episode_is_taken_back(kind: Any, stack: int) -> None:
    observation = Field((3,), stack=stack)
    buffer = kind(10, observation, 2, task_ids=[0, 0], seed=3)
    feed = Feed(10, (0, 0), observation, seed=3)
    more_of = functools.partial(feed.add, [0, 1])
    for step in range(9):
        more_of(None, [ENDS[step == 5], ENDS[0]], buffer)
    assert buffer.discard_episode(0) == 3
    del feed.history[0][-3:]
    assert buffer.discard_episode(1) == 5
    assert len(buffer) == 2
    kept = buffer.all()
    assert kept.indices.tolist() == [8, 10]
    assert kept.rewards.tolist() == [float(feed.history[0][n].reward) for n in (4, 5)]
    assert {int(i) for i in buffer.sample(2, 50).indices.flatten()} == {8, 10}
    for _ in range(7):
        feed.add([0], None, [ENDS[0]], buffer)
        newest = buffer[buffer.indices()[-1:]]
        assert newest.rewards[0] == float(feed.history[0][-1].reward)
    with pytest.raises(IndexError, match=r"stream must lie in 0\.\.1, got 2"):
        buffer.discard_episode(2)
    buffer.clear()
    assert len(buffer) == 0
    assert buffer.discard_episode(0) == 0
    assert buffer.draws > 0


@pytest.mark.parametrize("kind", [ReplayBuffer, DEVICE])
def test_a_reset_cuts_an_episode_where_the_next_begins_with_the_same_observation(kind: Any) -> None:
    buffer = kind(10, 1, 1)
    for step in range(3):
        if step == 2:
            buffer.reset()
        buffer.add([float(step)], [0.0], 1.0, False, False, [float(step + 1)])
    batch = buffer.sample_sequences(50, 3)
    assert batch.extras["starts"][0].tolist() == [True, False, True]
    summed = buffer.sample(3, 30, n_step=3, discount=1.0)
    assert summed.steps[summed.indices == 0].unique().tolist() == [2]
    assert summed.next_observations[summed.indices == 0].unique().tolist() == [2.0]


# ---- Batches in other people's hands


def test_extras_survive_what_frameworks_do_with_tuples() -> None:
    batch = filled(steps=9, extras={"cost": Field((), "float32")}).buffer.sample(4)
    two = default_collate([batch, batch])
    assert torch.equal(two.extras["cost"][1], batch.extras["cost"])
    assert torch.equal(two.observations[0], batch.observations)
    for made in (
        torch.utils._pytree.tree_map(torch.clone, batch),
        torch.func.vmap(lambda x: x)(batch),
        pickle.loads(pickle.dumps(batch)),
        copy.deepcopy(batch),
        next(iter(torch.utils.data.DataLoader([batch], batch_size=None))),
    ):
        assert type(made) is type(batch)
        assert_same_batch(made, batch)
    with pytest.raises(TypeError, match="a Batch has columns, not rows"):
        batch[:2]
    assert batch[2] is batch.rewards


def test_extras_survive_jax() -> None:
    require("mjx")
    import jax

    batch = filled(steps=9, extras={"cost": Field((), "float32")}).buffer.sample(4)
    made = jax.tree.map(lambda x: x.numpy() * 2, batch)
    assert (made.extras["cost"] == 2 * batch.extras["cost"].numpy()).all()


@pytest.mark.parametrize("n_step", [1, 3])
def test_a_batch_tells_how_its_transitions_end(n_step: int) -> None:
    batch = filled(50, steps=40).buffer.sample(30, 4, n_step=n_step, discount=0.5)
    assert batch.terminated.any()
    assert batch.truncated.any()
    assert torch.equal(batch.masks == 0, batch.terminated)
    assert batch.steps.max() == n_step
    assert torch.equal(batch.masks, torch.where(batch.terminated, 0, 0.5 ** (batch.steps - 1).float()))
