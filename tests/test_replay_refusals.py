"""What the replay buffer refuses, in which words, and that nothing has changed then."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require

from brc_fast import _core
from brc_fast.replay import DeviceReplayBuffer, Field, ReplayBuffer
from brc_fast.replay.request import Size

require("hypothesis")

from refusals import says
from replay_oracle import ENDS, Feed, assert_same, filled, read_all


def one(**changes: Any) -> dict[str, Any]:
    """A transition of one stream with O = 3 and A = 2."""
    return {
        "observations": np.ones((1, 3), np.float32),
        "actions": np.full((1, 2), 0.5, np.float32),
        "rewards": np.ones(1, np.float32),
        "terminated": np.zeros(1, bool),
        "truncated": np.zeros(1, bool),
        "successors": np.full((1, 3), 2.0, np.float32),
        **changes,
    }


@pytest.mark.parametrize("how", [copy.copy, copy.deepcopy, pickle.dumps])
@pytest.mark.parametrize("kind", [ReplayBuffer, DeviceReplayBuffer])
def test_a_buffer_is_kept_by_saving_it(how: Any, kind: Any) -> None:
    on = {"device": "cpu"} if kind is DeviceReplayBuffer else {}
    with pytest.raises(TypeError, match=rf"{kind.__name__} is neither pickled nor copied: `save\(folder\)`"):
        how(kind(10, 3, 2, **on))


KINDS = [ReplayBuffer, functools.partial(DeviceReplayBuffer, device="cpu")]
PLAIN = {
    "observations": np.array([[1, 2, 3]], np.float32),
    "actions": np.array([[4, 5]], np.float32),
    "rewards": np.array([0.1], np.float32),
    "terminated": np.array([True]),
    "truncated": np.array([False]),
    "successors": np.array([[6, 7, 8]], np.float32),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "given",
    [
        {"observations": np.array([[1.0, 2, 3]]), "rewards": np.array([0.1]), "successors": [[6.0, 7, 8]]},
        {
            "observations": [1, 2, 3],
            "actions": (4, 5),
            "rewards": 0.1,
            "terminated": True,
            "truncated": False,
        },
        {
            "actions": torch.tensor([[4, 5]]).half(),
            "observations": torch.tensor([[1, 2, 3]], dtype=torch.uint8),
        },
        {"terminated": np.ones(1, np.uint8), "truncated": [0], "streams": [0]},
        {
            "observations": np.array([[1, 2, 3]], ">f4"),
            "streams": np.zeros(1, ">i4"),
            "rewards": np.float64(0.1),
        },
        {"observations": np.array([[1, 2, 3]], np.uint16), "streams": 0},
    ],
    ids=["float64", "one row", "tensors", "flags", "byte order", "uint16"],
)
def test_what_people_have_is_taken_where_nothing_is_lost(kind: Any, given: dict[str, Any]) -> None:
    buffer, twin = kind(4, 3, 2), kind(4, 3, 2)
    twin.add(**PLAIN)
    buffer.add(**{**PLAIN, **given})
    for got, expected in zip(buffer.all().tensors(), twin.all().tensors(), strict=True):
        assert got.dtype == expected.dtype
        assert torch.equal(got, expected)


def test_arrays_of_jax_are_taken() -> None:
    require("mjx")
    import jax.numpy as jnp

    buffer, twin = ReplayBuffer(4, 3, 2), ReplayBuffer(4, 3, 2)
    twin.add(**PLAIN)
    buffer.add(**{name: jnp.asarray(value) for name, value in PLAIN.items()})
    assert torch.equal(buffer.all().observations, twin.all().observations)
    assert torch.equal(buffer.all().terminated, twin.all().terminated)


@pytest.mark.parametrize(
    ("name", "value", "error", "words"),
    [
        ("observations", [[0, 1e300, 0]], TypeError, "float32, which does not hold 1e+300, got as float64"),
        ("actions", np.ones((1, 2), complex), TypeError, "float32, got complex128"),
        ("actions", torch.ones(1, 2, dtype=torch.complex64), TypeError, "float32, got torch.complex64"),
        ("actions", [[2**24 + 1, 0]], TypeError, "float32, which does not hold 16777217, got as int64"),
        (
            "actions",
            [[1.0, 2.0], [3.0]],
            TypeError,
            "an array, a tensor or a list of float32 numbers, got list",
        ),
        ("actions", [[None, 1.0]], TypeError, "an array, a tensor or a list of float32 numbers, got list"),
        ("terminated", np.full(1, 2, np.uint8), TypeError, "bool, which does not hold 2, got as uint8"),
        ("terminated", [0.5], TypeError, "bool, which does not hold 0.5, got as float64"),
        ("truncated", [float("nan")], TypeError, "bool, which does not hold nan, got as float64"),
        ("rewards", "1.0", TypeError, "an array, a tensor or a list of float32 numbers, got str"),
        ("rewards", None, TypeError, "an array, a tensor or a list of float32 numbers, got NoneType"),
        ("rewards", torch.ones(1, device="meta"), TypeError, "on the CPU, got meta ... .cpu()"),
        ("streams", [0.5], TypeError, "int64, which does not hold 0.5, got as float64"),
        ("streams", np.array([2**63], np.uint64), TypeError, "int64"),
        ("observations", np.ones((1, 4), np.float32), ValueError, "[M, O] = [1, 3], got [1, 4]"),
        ("successors", np.ones((1, 1, 3), np.float32), ValueError, "[M, O] = [1, 3], got [1, 1, 3]"),
        ("rewards", np.ones((1, 1), np.float32), ValueError, "[M] = [1], got [1, 1]"),
        ("actions", np.ones(3, np.float32), ValueError, "[M, A] = [1, 2], got [3]"),
        ("truncated", np.zeros(2, bool), ValueError, "[M] = [1], got [2]"),
        ("streams", np.array([1]), ValueError, "0..0, got 1"),
        ("streams", np.array([-1]), ValueError, "0..0, got -1"),
        ("streams", np.zeros((1, 1), np.int64), ValueError, "[M] = [any], got [1, 1]"),
        ("extras", {"cost": np.zeros(1)}, ValueError, "hold [], got ['cost']"),
        ("observations", np.full((1, 3), np.nan, np.float32), ValueError, "finite, got nan ... nothing"),
        ("actions", torch.tensor([[0.0, np.inf]]), ValueError, "finite, got inf ... nothing"),
        ("rewards", np.array([-np.inf], np.float32), ValueError, "finite, got -inf ... nothing"),
        ("successors", np.array([[0, 1, np.nan]], np.float32), ValueError, "finite, got nan ... nothing"),
    ],
)
@pytest.mark.parametrize("earlier", [0, 1])
def test_a_refused_transition_changes_nothing(
    name: str, value: Any, error: type[Exception], words: str, earlier: int
) -> None:
    feed, twin = Feed(4), Feed(4)
    for _ in range(earlier):
        feed.add()
        twin.add()
    with pytest.raises(error, match=says(f"{name} ... {words}")):
        feed.buffer.add(**one(**{name: value}))
    feed.check_content()
    feed.add([0], [True])
    twin.add([0], [True])
    feed.check_content()
    assert_same(read_all(feed.buffer), read_all(twin.buffer))


def test_the_message_names_stream_and_task_among_several() -> None:
    feed = filled(task_ids=(0, 1, 0))
    added = feed.arguments([1, 2, 1], [True] * 3, [ENDS[0]] * 3)
    with pytest.raises(ValueError, match="streams must differ, got 1 twice"):
        feed.give(added, feed.buffer)
    added = feed.arguments([2, 1], [True] * 2, [ENDS[0]] * 2)
    added["successors"][1, 2] = np.nan
    with pytest.raises(ValueError, match=says("successors of stream 1 (task 1) ... got nan")):
        feed.give(added, feed.buffer)
    added = feed.arguments([0, 1, 2], [True] * 3, [ENDS[1]] * 3)
    added["observations"] = added["observations"][:2]
    with pytest.raises(ValueError, match=says("observations ... = [3, 3], got [2, 3]")):
        feed.buffer.add(**{**added, "streams": None})
    feed.check_content()


@pytest.mark.parametrize("place", range(35))
def test_a_value_that_is_not_finite_is_found_wherever_it_stands(place: int) -> None:
    feed = Feed(3, observation=Field((35,)), action=Field((35,)))
    feed.add()
    for name in ("observations", "actions", "successors"):
        added = feed.arguments([0], [True], [ENDS[0]])
        added[name][0, place] = -np.inf
        with pytest.raises(ValueError, match=f"^{name} of stream 0 .* got -inf"):
            feed.give(added, feed.buffer)
    feed.check_content()


def test_with_allow_what_is_not_finite_comes_back_bit_for_bit() -> None:
    feed = Feed(6, (0, 1), non_finite="allow")
    odd = np.array([0x7FC00000, 0x7F800001, 0xFFC12345, 0x7F800000, 0xFF800000, 1], np.uint32)
    for step in range(9):
        added = feed.arguments([0, 1], [step % 3 == 0] * 2, [ENDS[step % 4]] * 2)
        for i, name in enumerate(("actions", "rewards", "successors", "observations")[: 3 + (step % 3 == 0)]):
            values = added[name].reshape(-1)
            values[-1:] = np.roll(odd, step + i)[:1].view(np.float32)
        feed.give(added, feed.buffer)
        feed.remember(added)
    assert np.isnan(read_all(feed.buffer)["rewards"]).any()
    feed.check_content()
    feed.check_sample(6, 4)


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        (
            {"batch_size": 256},
            ValueError,
            "batch_size 256 exceeds the 11 ... collect more or lower batch_size",
        ),
        ({"batch_size": 0}, ValueError, "batch_size and num_batches ... at least 1, got 0 and 1"),
        ({"num_batches": 0}, ValueError, "batch_size and num_batches ... at least 1, got 1 and 0"),
        ({"batch_size": -1}, ValueError, "batch_size and num_batches ... at least 1, got -1 and 1"),
        ({"batch_size": 2.0}, TypeError, "batch_size ... integer, got 2.0"),
        ({"batch_size": "2"}, TypeError, "batch_size ... integer, got '2'"),
        ({"num_batches": "2"}, TypeError, "num_batches ... integer, got '2'"),
        ({"n_step": 2.0, "discount": 0.9}, TypeError, "n_step ... integer, got 2.0"),
        ({"n_step": 0}, ValueError, "n_step ... at least 1, got 0"),
        ({"n_step": 1025, "discount": 1.0}, ValueError, "n_step ... at most 1024, got 1025"),
        ({"n_step": 2}, ValueError, "discount must be given with n_step 2"),
        ({"n_step": 2, "discount": 1.5}, ValueError, "discount ... 0..1, got 1.5"),
        ({"n_step": 2, "discount": -0.1}, ValueError, "discount ... 0..1, got -0.1"),
        ({"n_step": 2, "discount": np.nan}, ValueError, "discount ... 0..1, got nan"),
        ({"n_step": 2, "discount": "x"}, TypeError, "discount ... number, got 'x'"),
        ({"tasks": [2]}, ValueError, "tasks ... 0..1, got 2"),
        ({"tasks": [-1]}, ValueError, "tasks ... 0..1, got -1"),
        ({"tasks": [0, 0]}, ValueError, "tasks must differ, got 0 twice"),
        ({"tasks": []}, ValueError, "tasks ... at least one task, got none"),
        ({"tasks": [0.5]}, TypeError, "tasks ... integers, got [0.5]"),
        ({"tasks": [True, False]}, TypeError, "tasks ... integers, got [True, False]"),
        ({"tasks": 1}, TypeError, "tasks ... integers, got 1"),
        ({"tasks": [1], "batch_size": 6}, ValueError, "batch_size 6 exceeds the 5 ... of the tasks named"),
        ({"weights": "even"}, ValueError, "weights ... \"equal\" ... got 'even'"),
        ({"weights": []}, ValueError, "weights ... one share per task, got none"),
        ({"weights": 0.5}, TypeError, "weights ... number per task, got 0.5"),
        ({"weights": [None, 1.0]}, TypeError, "weights ... number per task, got [None, 1.0]"),
        ({"weights": {1: 0.5}}, TypeError, "weights ... number per task, got {1: 0.5}"),
        ({"weights": [1.0]}, ValueError, "weights ... each of 2 tasks, got 1"),
        ({"weights": [1.0, 1.0], "tasks": [1]}, ValueError, "weights ... each of 1 tasks, got 2"),
        ({"weights": [1.0, -1.0]}, ValueError, "weights ... not negative, got -1.0"),
        ({"weights": [1.0, np.nan]}, ValueError, "weights must be finite ... got nan"),
        ({"weights": [0.0, 0.0]}, ValueError, "weights ... positive, finite sum, got 0.0"),
        ({"weights": [1e308, 1e308]}, ValueError, "weights ... positive, finite sum, got inf"),
    ],
)
def test_a_sample_that_cannot_be_is_refused_and_draws_nothing(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    feed = filled()
    request = {"batch_size": 1, **arguments}
    with pytest.raises(error, match=says(words)):
        feed.buffer.sample(**request)
    with pytest.raises(error, match=says(words)), feed.buffer.prefetch(**request) as batches:
        next(batches)
    assert feed.buffer.draws == 0
    feed.check_sample(3, 2)


def test_a_task_without_transitions_cannot_have_a_weight() -> None:
    feed = Feed(5, (0, 1))
    feed.add([0])
    with pytest.raises(ValueError, match=r"task 1 has weight 1.0+ and no transition"):
        feed.buffer.sample(1, weights="equal")
    with pytest.raises(ValueError, match=r"batch_size 1 exceeds the 0 .* of the tasks named"):
        feed.buffer.sample(1, tasks=[1])
    with pytest.raises(ValueError, match="batch_size 1 exceeds the 0 transitions stored;"):
        feed.empty().sample(1)
    feed.check_sample(1, 3, weights=[2.0, 0.0])


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"capacity": 0}, ValueError, "capacity ... at least 1, got 0"),
        ({"capacity": [4, 4]}, ValueError, "capacity ... each of 1 tasks, got 2"),
        ({"capacity": [0.5]}, TypeError, "capacity ... an integer or one for each task, got [0.5]"),
        ({"capacity": 0.5}, TypeError, "capacity ... an integer or one for each task, got 0.5"),
        ({"capacity": 2**70}, ValueError, f"capacity ... at most 536870912, got {2**70}"),
        ({"capacity": 2**29}, ValueError, "capacity ... needs 536870913 rows ... at most 536870912"),
        ({"observation_size": 2**70}, ValueError, f"observations ... 1 to 1073741824 bytes, got {2**72}"),
        ({"observation_size": -1}, ValueError, "observation_size ... at least 1, got -1"),
        ({"action_size": 0}, ValueError, "action_size ... at least 1, got 0"),
        ({"action_size": 1.5}, TypeError, "action_size ... a shape or a Field, got 1.5"),
        ({"action_size": (2, 0)}, ValueError, "action_size ... at least 1, got (2, 0)"),
        (
            {"action_size": Field((1,), stack=2)},
            ValueError,
            "stack is for observations only, got 2 for action",
        ),
        ({"extras": {"x": Field((), stack=3)}}, ValueError, "stack is for observations only, got 3 for x"),
        ({"extras": {"x": 0}}, ValueError, "x must be at least 1, got 0"),
        ({"extras": {f"x{i}": 1 for i in range(16)}}, ValueError, "1 to 16 fields ... got 17"),
        ({"observation_size": Field((1,), stack=1025)}, ValueError, "stack ... at most 1024, got 1025"),
        ({"task_ids": []}, ValueError, "task_ids ... [N] with N >= 1, got [0]"),
        ({"task_ids": [[0]]}, ValueError, "task_ids ... [N] with N >= 1, got [1, 1]"),
        ({"task_ids": [0.0]}, TypeError, "task_ids must be integers, got float64"),
        ({"task_ids": [0, -1]}, ValueError, "task_ids of 2 streams ... 0..1, got -1"),
        ({"task_ids": [0, 2]}, ValueError, "task_ids of 2 streams ... 0..1, got 2"),
        ({"task_ids": [0, 2, 2]}, ValueError, "task_ids ... every task of 0..2, but none is 1"),
        ({"extras": [("x", 1)]}, TypeError, "extras must map names to fields, got [('x', 1)]"),
        ({"extras": {1: 2}}, TypeError, "extras must be named by strings, got 1"),
        ({"seed": 1.5}, TypeError, "seed ... integer, got 1.5"),
        ({"seed": -1}, ValueError, "seed ... 0..2**64-1, got -1"),
        ({"seed": 2**64}, ValueError, "seed ... 0..2**64-1, got 18446744073709551616"),
        ({"non_finite": "ignore"}, ValueError, 'non_finite ... "error" or "allow", got \'ignore\''),
        ({"observation_size": 2**20, "capacity": 2**28}, MemoryError, "268435457 rows of 4194368 bytes"),
    ],
)
def test_a_buffer_that_cannot_be_is_refused(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=says(words)):
        ReplayBuffer(**{"capacity": 4, "observation_size": 1, "action_size": 1, **arguments})


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"shape": (2.5,)}, TypeError, "shape must be an integer, got 2.5"),
        ({"shape": "3"}, TypeError, "shape must be an integer, got '3'"),
        ({"shape": None}, TypeError, "shape must be an integer, got None"),
        ({"shape": (2, 0)}, ValueError, "shape ... at least 1, got [2, 0]"),
        ({"shape": -2}, ValueError, "shape ... at least 1, got [-2]"),
        ({"stack": 2.0}, TypeError, "stack must be an integer, got 2.0"),
        ({"stack": 0}, ValueError, "stack must be at least 1, got 0"),
        ({"dtype": "float64"}, ValueError, "dtype ... float32, ... bool, got float64"),
        ({"dtype": np.float64}, ValueError, "dtype ... float32, ... bool, got float64"),
        ({"dtype": torch.complex64}, ValueError, "dtype ... float32, ... bool, got complex64"),
        ({"dtype": "uint16"}, ValueError, "dtype ... float32, ... bool, got uint16"),
    ],
)
def test_a_field_that_cannot_be_is_refused(
    arguments: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=says(words)):
        Field(**arguments)


def test_integers_of_numpy_and_torch_are_those_of_python(tmp_path: Path) -> None:
    frame = Field(np.int64(3), np.float32, stack=np.int64(2))
    assert frame == Field((3,), torch.float32, stack=2)
    filled(observation=frame).buffer.save(tmp_path)
    feed = filled(300, steps=250)
    for size in (np.int16(260), np.int8(16), torch.tensor(5)):  # whose products they do not hold
        feed.check_sample(size, size // 2)
        feed.check_sample(int(size), int(size) // 2)


@pytest.mark.parametrize("num_batches", [2**58, 2**62, 2**64])
def test_batches_beyond_all_memory_are_refused_with_the_sizes(num_batches: int) -> None:
    feed = filled()
    with pytest.raises(MemoryError, match=f"bytes for {num_batches} batches of 2"):
        feed.buffer.sample(2, num_batches)
    feed.check_sample(2, 1)


@pytest.mark.parametrize(
    "name", ["observations", "actions", "rewards", "masks", "next_observations", "task_ids"]
)
def test_an_extra_field_cannot_have_the_name_of_another_column(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        ReplayBuffer(4, 1, 1, extras={name: Field((), "int64")})


def test_the_binding_refuses_arrays_that_do_not_fit_the_store() -> None:
    feed = filled()
    store, arena = feed.buffer._store, feed.buffer._arena
    request = _core.Request(1, 1.0, [], [])
    views, slot, _ = arena.lease(Size.of(4, 1))
    with pytest.raises(ValueError, match="observations must hold 36 bytes, got 48"):
        store.sample(request, 1, 3, views, slot)
    parts = [_core.View(np.dtype("float32"), 2, (1, 1), 0)]
    with pytest.raises(ValueError, match="another number of columns is expected"):
        store.sample(request, 1, 1, _core.Views(parts), slot)
    with pytest.raises(ValueError, match="a slot of 4 bytes is expected, got 2"):
        _core.Views(parts).tensors(_core.Slot(np.zeros(2, np.uint8)))
    no = np.zeros(1, bool)
    frame = np.zeros((1, 3), np.float32)
    with pytest.raises(ValueError, match="actions must hold 8 bytes, got 12"):
        store.add(np.zeros(1, np.int64), [frame], [frame], frame[0, :1], no, no, [frame])
    with pytest.raises(TypeError, match="incompatible function arguments"):
        store.add(np.zeros(1), [frame], [frame[:, :2].copy()], frame[0, :1], no, no, [frame])
    feed.check_content()
    feed.check_sample(5, 2)
