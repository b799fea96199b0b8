"""The memory that batches lie in, and calls from several threads."""

from __future__ import annotations

import ctypes
import functools
import itertools
import os
import pickle
import select
import signal
import sys
import threading
import time
import tracemalloc
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from extras import require

from brc_fast.batch import Batch
from brc_fast.replay import DeviceReplayBuffer, Field, ReplayBuffer, arena, files, forks

require("hypothesis")

from replay_oracle import (
    arrays_of,
    assert_same_batch,
    filled,
    manifest_of,
    more,
    read_all,
    wait_for,
    wait_until_full,
)


def test_what_is_held_never_changes() -> None:
    feed = filled(50, steps=30, extras={"cost": Field((), "bfloat16")})
    held: list[tuple[torch.Tensor, torch.Tensor]] = []
    with feed.buffer.prefetch(16, 2) as batches:
        for step in range(60):
            batch = next(batches) if step % 3 == 0 else feed.buffer.sample(16, 2, copy=step % 3 == 1)
            parts: tuple[torch.Tensor, ...] = tuple(batch.tensors())
            if step % 4 == 1:
                parts = (*batch.update(1).tensors(), batch.extras["cost"][1, 2:])
            elif step % 4 == 2:
                parts = (batch.observations[0, 3], torch.from_numpy(batch.rewards.numpy()[1:]))
            elif step % 4 == 3:
                parts = (batch.masks.view(4, 8), batch.extras["cost"].detach())
            held += [(part, part.clone()) for part in parts]
            del batch, parts
            more(feed, 1)
    for part, before in held:
        assert torch.equal(part, before)


VIEWS: dict[str, Callable[[Batch], Any]] = {
    "updates": lambda batch: batch.updates(),
    "element": lambda batch: batch.observations[3, 0],
    "numpy": lambda batch: batch.rewards.numpy(),
    "storage": lambda batch: batch.task_ids.untyped_storage(),
    "extra": lambda batch: batch.extras["cost"],
}


@pytest.mark.parametrize("compiled", [True, False], ids=["DLPack", "numpy"])
@pytest.mark.parametrize("keep", list(VIEWS))
def test_memory_is_used_again_when_the_last_view_on_it_is_gone(
    keep: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "C_TENSORS", compiled and arena.C_TENSORS)
    buffer = filled(extras={"cost": Field((), "bfloat16")}).buffer
    batch = buffer.sample(4)
    place = batch.observations.data_ptr()
    view = VIEWS[keep](batch)
    del batch
    others = {buffer.sample(4).observations.data_ptr() for _ in range(6)}
    assert place not in others
    del view
    places = {buffer.sample(4).observations.data_ptr() for _ in range(6)}
    assert place in places
    assert places <= {place, *others}
    assert buffer.sample(5).observations.data_ptr() not in places


class Address:
    """A column as a copy that holds nothing knows it: where it lies. And what the copy should read."""

    def __init__(self, column: torch.Tensor) -> None:
        self.bytes = (ctypes.c_char * (column.numel() * column.element_size())).from_address(
            column.data_ptr()
        )
        self.expected = self.bytes.raw

    def right(self) -> bool:
        return self.bytes.raw == self.expected


@pytest.mark.parametrize("compiled", [True, False], ids=["DLPack", "numpy"])
@pytest.mark.parametrize("others", [(), ((5, 1),), ((4, 3), (5, 1))], ids=len)
def test_a_batch_that_was_dropped_is_still_there_after_the_next_sample(
    others: tuple[tuple[int, int], ...], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arena, "C_TENSORS", compiled and arena.C_TENSORS)
    buffer = filled(300, steps=150).buffer
    for step in range(40):
        if others:
            buffer.sample(*others[step % len(others)])
        address = Address(buffer.sample(4, 3).observations)
        buffer.sample(*others[0] if others else (4, 3))
        assert address.right()


@pytest.mark.parametrize("depth", [1, 3])
def test_a_prefetched_batch_that_was_dropped_is_still_there_after_the_next_one(depth: int) -> None:
    with filled(300, steps=150).buffer.prefetch(16, depth=depth) as batches:
        for _ in range(20):
            address = Address(next(batches).observations)
            next(batches)
            wait_until_full(batches)
            assert address.right()


class Lender:
    """In the place of torch's pinned memory, which needs CUDA: notes what it lends, and until when."""

    def __init__(self) -> None:
        self.lent: list[weakref.ref[np.ndarray]] = []
        self.places: list[int] = []

    def __call__(self, nbytes: int) -> torch.Tensor:
        array = np.empty(nbytes, np.uint8)
        self.lent.append(weakref.ref(array))
        self.places.append(array.ctypes.data)
        return torch.from_numpy(array)


@pytest.fixture
def lender(monkeypatch: pytest.MonkeyPatch) -> Lender:
    lender = Lender()
    monkeypatch.setattr(arena, "pinned_memory", lender)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return lender


@pytest.mark.parametrize("dtype", ["float32", "uint8", "bfloat16"])
def test_batches_in_pinned_memory_are_the_same(dtype: str, lender: Lender) -> None:
    kinds = {"observation": Field((3, 2), dtype, stack=2), "extras": {"cost": Field((), "float16")}}
    pinned, twin = filled(300, steps=150, **kinds), filled(300, steps=150, **kinds)
    twin.buffer._arena.pinned = False
    for copy in (False, True):
        got, expected = (feed.buffer.sample(5, 3, copy=copy) for feed in (pinned, twin))
        for value, other in zip(got.tensors(), expected.tensors(), strict=True):
            assert (value.dtype, value.shape, value.stride()) == (other.dtype, other.shape, other.stride())
        assert_same_batch(got, expected)
    with pinned.buffer.prefetch(5, 3) as batches:
        for _ in range(4):
            assert_same_batch(next(batches), twin.buffer.sample(5, 3))
    assert lender.places


def test_torch_can_tell_whose_pinned_memory_a_column_is(lender: Lender) -> None:
    """By the storage: it is what torch looks at when it has begun a copy."""
    batch = filled(extras={"cost": Field((), "bfloat16")}).buffer.sample(4, 2)
    tensors = [*batch.tensors(), batch.update(1).actions, batch.task_ids[0, 2:]]
    assert {tensor.untyped_storage().data_ptr() for tensor in tensors} == {lender.places[-1]}
    batch.rewards.mul_(2.0)  # which no graph that keeps the observations may take for a change of them
    assert batch.observations._version < batch.rewards._version


@pytest.mark.parametrize("keep", list(VIEWS))
def test_pinned_memory_goes_back_to_torch_one_sample_after_the_last_view(keep: str, lender: Lender) -> None:
    buffer = filled(extras={"cost": Field((), "bfloat16")}).buffer
    view = VIEWS[keep](buffer.sample(4))
    buffer.sample(4)
    buffer.sample(4)
    assert [array() is not None for array in lender.lent] == [True, False, True]
    del view
    assert [array() is not None for array in lender.lent] == [False, False, True]


def test_copies_have_memory_of_their_own_that_goes_back_to_the_system() -> None:
    buffer, twin = filled().buffer, filled().buffer
    copies = [buffer.sample(4, copy=True) for _ in range(3)]
    places = {batch.observations.data_ptr() for batch in (*copies, buffer.sample(4))}
    assert len(places) == 4
    for copy in copies:
        assert_same_batch(copy, twin.sample(4))
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    large = buffer.sample(4, 20_000, copy=True)
    assert tracemalloc.get_traced_memory()[0] - before > 3_000_000
    del large
    assert tracemalloc.get_traced_memory()[0] - before < 100_000
    tracemalloc.stop()


def test_memory_for_sizes_of_batches_that_nobody_asks_for_any_more_goes_back() -> None:
    buffer, twin = filled(300, steps=150).buffer, filled(300, steps=150).buffer
    held = buffer.sample(1, 30)
    tracemalloc.start()
    assert_same_batch(held, twin.sample(1, 30, copy=True))
    for size in range(1, 200):
        assert_same_batch(buffer.sample(size, 30), twin.sample(size, 30, copy=True))
    assert tracemalloc.get_traced_memory()[0] < 9e6  # a twentieth of it all
    tracemalloc.stop()
    assert_same_batch(held, filled(300, steps=150).buffer.sample(1, 30))


def test_the_numpy_view_shares_the_memory_of_a_batch_and_not_of_the_store() -> None:
    feed = filled()
    batch = feed.buffer.sample(4)
    feed.draws += 1
    for name, array in batch.numpy().items():
        array[...] = 7
        assert bool((getattr(batch, name) == array).all())
    feed.check_content()
    feed.check_sample(4)


# ---- Threads


def test_two_threads_share_the_draws_of_one() -> None:
    feed, twin = filled(), filled().buffer

    def sample() -> list[bytes]:
        return [arrays_of(twin.sample(5, 2))["rewards"].tobytes() for _ in range(200)]

    with ThreadPoolExecutor(2) as pool:
        drawn = [future.result() for future in (pool.submit(sample), pool.submit(sample))]
    expected = [arrays_of(feed.buffer.sample(5, 2))["rewards"].tobytes() for _ in range(400)]
    assert sorted(drawn[0] + drawn[1]) == sorted(expected)
    assert twin.draws == 800


def test_two_threads_may_save_to_the_same_folder(tmp_path: Path) -> None:
    feed = filled(200, steps=60)

    def save() -> None:
        for _ in range(40):
            feed.buffer.save(tmp_path)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(save), pool.submit(save)]:
            future.result()
    feed.loaded(tmp_path).check_content()
    feed.loaded(tmp_path, previous=True).check_content()


@pytest.mark.parametrize("stack", [1, 3])
@pytest.mark.parametrize("steps", [1, 7, 200])
@pytest.mark.parametrize("base", [False, True], ids=["whole", "further"])
def test_a_save_holds_what_was_stored_when_it_began(
    tmp_path: Path, stack: int, steps: int, base: bool
) -> None:
    """And an add does not wait for it, though the file takes no more bytes for now."""
    image = Field((50_000,), "uint8", stack=stack)
    feed = filled([90, 2], (0, 1, 0), steps=20 if base else 70, observation=image)
    store, folder = feed.buffer._store, tmp_path / "replay"
    if base:
        feed.buffer.save(folder)
        more(feed, 55)
    expected, draws = feed.copied(), feed.draws
    start = files._start(manifest_of(folder) if base else None, 3)
    out, into = os.pipe()
    with ThreadPoolExecutor(1) as pool:
        saving = pool.submit(store.write_segment, into, start)
        wait_for(lambda: select.select([out], [], [], 0)[0])
        before = time.monotonic()
        more(feed, steps)
        assert time.monotonic() - before < 5
        assert not saving.done()
        saving.add_done_callback(lambda _: os.close(into))
        segment = tmp_path / "segment"
        with segment.open("wb") as file:
            while len(data := os.read(out, 1 << 20)) > 0:
                file.write(data)
        os.close(out)
        snapshot = saving.result()
    segments = [(segment, snapshot["table"])]
    if base:
        segments.insert(0, (folder / (old := manifest_of(folder)["segments"][0])["file"], old))
    with ExitStack() as opened:
        files_ = [
            (opened.enter_context(path.open("rb")).fileno(), str(path), table) for path, table in segments
        ]
        expected.buffer._store.load(snapshot["content"], files_, feed.seed)
    assert expected.draws == draws
    expected.check_content(3, 0.5)
    more(expected, 3)  # it goes on as the buffer did
    expected.check_content()
    feed.check_content()


STREAMS, EPISODE = 4, 7


def tagged(step: int) -> dict[str, np.ndarray]:
    """Step `step` of four streams: every float of a transition names it; the last of an episode is an end."""
    tag = (np.arange(STREAMS) * 2.0**20 + step).astype(np.float32)
    last = step % EPISODE == EPISODE - 1
    observations = np.repeat(tag[:, None], 9, 1)
    return {
        "observations": observations,
        "actions": np.repeat(tag[:, None], 5, 1),
        "rewards": tag,
        "terminated": np.full(STREAMS, last),
        "truncated": np.zeros(STREAMS, bool),
        "successors": observations + np.float32(0.5 if last else 1),
    }


def check_tags(batch: Batch | dict[str, np.ndarray], n_step: int) -> None:
    """Each is a transition, or several of an episode, that was added."""
    columns = arrays_of(batch) if isinstance(batch, Batch) else batch
    tag, following = columns["observations"][..., 0], columns["next_observations"][..., 0]
    for name, first in (("observations", tag), ("actions", tag), ("next_observations", following)):
        assert (columns[name] == first[..., None]).all()
    steps = np.ceil(following - tag)
    assert ((steps >= 1) & (steps <= n_step)).all()
    ended = following % 1 == 0.5
    assert (ended == (tag % 2**20 % EPISODE + steps == EPISODE)).all()
    rewards = sum(np.where(i < steps, 0.5**i * (tag + i), 0) for i in range(n_step))
    np.testing.assert_allclose(columns["rewards"], rewards, rtol=1e-6)
    assert (columns["masks"] == np.where(ended, 0, 0.5 ** (steps - 1))).all()


def at_once(seconds: float, *tasks: Callable[[], Any]) -> None:
    """Threads that do each task again and again, and more than once."""
    end = time.monotonic() + seconds

    def repeated(task: Callable[[], Any]) -> int:
        count = 0
        while time.monotonic() < end:
            task()
            count += 1
        return count

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor(len(tasks)) as pool:
            done = [future.result() for future in [pool.submit(repeated, task) for task in tasks]]
    finally:
        sys.setswitchinterval(interval)
    assert min(done) > 1


@pytest.mark.parametrize(
    ("kind", "seconds"), [(ReplayBuffer, 2), (functools.partial(DeviceReplayBuffer, device="cpu"), 3)]
)
def test_adding_sampling_and_saving_at_the_same_time_never_mixes_transitions(
    kind: Any, seconds: float, tmp_path: Path
) -> None:
    """One thread adds, two sample, one takes what was prefetched, and one saves."""
    sizes: dict[str, Any] = {"capacity": STREAMS * 50, "observation_size": 9, "action_size": 5}
    buffer, restored = (make(**sizes, task_ids=[0] * STREAMS) for make in (kind, ReplayBuffer))
    steps = itertools.count()
    for _ in range(60):
        buffer.add(**tagged(next(steps)))

    def save() -> None:
        buffer.save(tmp_path)
        assert buffer.draws % 2 == 0
        restored.load(tmp_path)
        stored = read_all(restored, 2, 0.5)
        check_tags(stored, 2)
        assert (np.diff(stored["observations"][:, 0].reshape(STREAMS, 50), axis=1) == 1).all()

    with buffer.prefetch(32, 2, n_step=3, discount=0.5) as batches:
        at_once(
            seconds,
            lambda: buffer.add(**tagged(next(steps) % 2**20)),
            lambda: check_tags(buffer.sample(32, 2), 1),
            lambda: check_tags(buffer.sample(32, 2, n_step=3, discount=0.5), 3),
            lambda: check_tags(next(batches), 3),
            save,
        )
    check_tags(buffer.sample(100), 1)


def test_a_buffer_on_a_device_is_refused_in_a_forked_process_and_freed_when_it_is_dropped() -> None:
    buffer = DeviceReplayBuffer(10, 1, 1, device="cpu")
    calls = {"sample": 1, "save": "none", "load": "none"}
    with buffer._saving, buffer._turns.turn(tuple):  # as other threads may be at the fork
        if (child := os.fork()) == 0:
            refused = 0
            for name, argument in calls.items():
                try:
                    getattr(buffer, name)(argument)
                except BaseException as error:
                    refused += isinstance(error, RuntimeError) and "forked" in str(error)
            os._exit(len(calls) - refused)
    assert os.waitpid(child, 0)[1] == 0
    alive = weakref.ref(buffer)
    del buffer
    assert alive() is None


def in_a_child(task: Callable[[], Any]) -> Any:
    """What it returns, or the error it raises, in a forked process; TimeoutError where it hangs."""
    out, into = os.pipe()
    if (child := os.fork()) == 0:
        try:
            result = task()
        except BaseException as error:
            result = error
        os.write(into, pickle.dumps(result))
        os._exit(0)
    os.close(into)
    try:
        if not select.select([out], [], [], 20)[0]:
            os.kill(child, signal.SIGKILL)
            raise TimeoutError
        return pickle.loads(os.read(out, 1 << 20))
    finally:
        os.waitpid(child, 0)
        os.close(out)


@pytest.mark.filterwarnings("ignore:.*fork")
def test_forked_processes_draw_batches_of_their_own_and_never_hang() -> None:
    feed = filled(500, steps=200, seed=7)
    buffer, stop = feed.buffer, threading.Event()

    def hammer() -> None:
        while not stop.is_set():
            buffer.sample(512, 4)

    def use() -> tuple[list[int], int]:
        drawn = buffer.sample(4).indices.tolist()
        more(feed, 1)
        return drawn, len(buffer)

    with ThreadPoolExecutor(3) as pool, buffer.prefetch(16, 2) as batches:
        tasks = [pool.submit(hammer), pool.submit(hammer)]
        drawn = [in_a_child(use) for _ in range(8)]
        refused = in_a_child(lambda: next(batches))
        stop.set()
        for task in tasks:
            task.result()
        next(batches)
    assert len({tuple(indices) for indices, _ in drawn}) == 8
    assert isinstance(refused, RuntimeError)
    assert "closed" in str(refused)
    assert {size for _, size in drawn} == {len(buffer) + 3}


@pytest.mark.filterwarnings("ignore:.*fork")
def test_what_a_child_draws_depends_on_the_seed_and_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    for number in (5, 5, 6):
        buffer = filled(500, steps=100, seed=7).buffer
        monkeypatch.setattr(forks, "_children", number - 1)
        drawn.append(in_a_child(lambda buffer=buffer: buffer.sample(8).indices.tolist()))
        assert (
            buffer.sample(8).indices.tolist()
            == filled(500, steps=100, seed=7).buffer.sample(8).indices.tolist()
        )
    assert drawn[0] == drawn[1] != drawn[2]


def test_workers_of_a_data_loader_draw_different_batches() -> None:
    buffer = filled(500, steps=100).buffer

    class Sampled(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            for _ in range(2):
                yield buffer.sample(6)

    loader = torch.utils.data.DataLoader(
        Sampled(), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    drawn = {tuple(batch.indices.tolist()) for batch in loader}
    assert len(drawn) == 4


def test_memory_of_batches_that_were_held_at_once_goes_back() -> None:
    buffer = filled(steps=9).buffer
    held = [buffer.sample(4) for _ in range(100)]
    slots = [weakref.ref(slot) for shape in buffer._arena._shapes.values() for slot in shape.slots]
    assert len(slots) == 100
    assert len({batch.rewards.data_ptr() for batch in held}) == 100
    del held
    for _ in range(3):
        buffer.sample(4)
    assert sum(slot() is not None for slot in slots) <= arena.MOST_SPARE + 2
