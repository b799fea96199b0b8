"""Copies and CUDA streams: what is still under way on a GPU reads what it should.

On a CPU with streams that only note what runs before what; on a GPU, by `make gpu`, behind a stream that is
kept busy (BRC_FAST_GPU_DRY=1 sends the same tests to the CPU).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from brc_fast import Batch, DeviceReplayBuffer, ReplayBuffer, replay
from brc_fast.batch import sent
from brc_fast.learner.graphs import Captured
from brc_fast.replay.turns import Turns

STREAMS = 4


def step(number: int, device: str = "cpu") -> dict[str, Tensor]:
    """Step `number` of four streams; every value names it, and one stream ends its episode."""
    tag = torch.arange(STREAMS) * 1000.0 + number
    ends = torch.arange(STREAMS) == number % (2 * STREAMS)
    values = {
        "observations": tag[:, None].repeat(1, 16),
        "actions": tag[:, None].repeat(1, 2),
        "rewards": tag,
        "terminated": ends,
        "truncated": torch.zeros(STREAMS, dtype=torch.bool),
        "successors": tag[:, None].repeat(1, 16) + 1.0,
    }
    return {name: value.to(device) for name, value in values.items()}


def buffers(*devices: str, capacity: int = 200, steps: int = 60) -> list[Any]:
    """Buffers with the same content and draws: ReplayBuffer for "host", DeviceReplayBuffer for others."""
    made: list[Any] = []
    for device in devices:
        sizes = (capacity, 16, 2)
        ids = [0] * STREAMS
        if device == "host":
            made.append(ReplayBuffer(*sizes, task_ids=ids, seed=1))
        else:
            made.append(DeviceReplayBuffer(*sizes, task_ids=ids, seed=1, device=device))
        for number in range(steps):
            made[-1].add(**step(number))
    return made


def assert_same(got: Batch, expected: Batch) -> None:
    for one, other in zip(got.tensors(), expected.tensors(), strict=True):
        assert torch.equal(one.cpu(), other.cpu())


# ---- What a GPU's streams would do, noted on a CPU


class Stream:
    """Knows what runs before whatever is launched in it next."""

    def __init__(self) -> None:
        self.seen: set[int] = set()

    def wait_event(self, event: Event) -> None:
        self.seen |= event.seen

    def record_event(self) -> Event:
        event = Event()
        event.record(self)
        return event


class Event:
    def record(self, stream: Stream) -> None:
        self.seen = set(stream.seen)


class Device(TorchDispatchMode):
    """Notes of every operation on some memory what has run before it, as far as streams and events tell."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.current = Stream()
        self.before: list[set[int]] = []  # of each operation
        self.known: dict[int, list[Stream]] = {}  # by address: the streams that torch knows to work there
        self.memory: Callable[[], Sequence[Tensor]] = tuple
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: self.current)
        monkeypatch.setattr(Tensor, "record_stream", lambda x, stream: self.streams_of(x).append(stream))

    def streams_of(self, x: Tensor) -> list[Stream]:
        """At first, that in which it is allocated."""
        return self.known.setdefault(x.untyped_storage().data_ptr(), [self.current])

    def launch(self) -> int:
        number = len(self.before)
        self.before.append(set(self.current.seen))
        self.current.seen.add(number)
        return number

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        places = {x.untyped_storage().data_ptr() for x in self.memory()}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if found := [x for x in given if x.untyped_storage().data_ptr() in places]:
            assert all(self.current in self.streams_of(x) for x in found)
            self.launch()
        return func(*args, **(kwargs or {}))


def test_a_turn_waits_for_the_turns_before_it_and_for_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    device, rng = Device(monkeypatch), np.random.default_rng(0)
    streams = [device.current, Stream(), Stream()]
    turns, over = Turns(torch.device("cuda:0")), set[int]()
    for _ in range(200):
        with device.stream(streams[rng.integers(3)]):
            own = set(device.current.seen)
            with suppress(OSError), turns.turn(tuple):
                launched = device.launch()
                if rng.random() < 0.2:
                    raise OSError
            assert device.before[launched] == own | over
            over = {*device.before[launched], launched}
            if rng.random() < 0.5:
                device.launch()  # an update, which is queued behind


def test_calls_with_different_streams_current_follow_each_other_on_the_device(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(replay.device, "FIRST_SLOTS", 16)  # so that memory must grow
    (buffer,) = buffers("cpu", capacity=3000, steps=4)
    buffer.save(tmp_path)
    device, rng = Device(monkeypatch), np.random.default_rng(0)
    device.memory = buffer._memory
    buffer._turns = Turns(torch.device("cuda:0"))
    before = buffer.nbytes
    for memory in device.memory():
        device.streams_of(memory)
    calls = {
        "add": lambda number: buffer.add(**step(number)),
        "sample": lambda number: buffer.sample(8, n_step=2, discount=0.9),
        "save": lambda number: buffer.save(tmp_path),
        "load": lambda number: buffer.load(tmp_path),
    }
    streams = [device.current, Stream(), Stream()]
    with device:
        for number, name in enumerate([*(["add", "sample"] * 30), *calls, *(["add"] * 5), *calls]):
            launched = len(device.before)
            with device.stream(streams[rng.integers(3)]):
                calls[name](number)
            assert len(device.before) > launched, name
    assert buffer.nbytes > before
    for launched, seen in enumerate(device.before):
        assert seen == set(range(launched))


def test_only_a_copy_to_a_gpu_may_still_be_under_way() -> None:
    class Asked:
        def to(self, device: str, non_blocking: bool) -> bool:
            return non_blocking

    for device, ahead in (("cuda", True), ("cuda:1", True), ("cpu", False), ("mps", False), ("xpu", False)):
        for given in (device, torch.device(device)):
            assert sent(Asked(), given) is ahead  # type: ignore[arg-type]


# ---- On a GPU


def keep_busy(device: str) -> None:
    """What is queued in the current stream now begins many milliseconds later."""
    if device == "cuda":
        torch.cuda._sleep(50_000_000)


COPIES: dict[str, Callable[[Batch, str], Sequence[Tensor]]] = {
    "batch": lambda batch, device: batch.to(device).tensors(),
    "update": lambda batch, device: batch.update(1).to(device).tensors(),
    "columns": lambda batch, device: [x.to(device, non_blocking=True) for x in batch.tensors()],
    "part": lambda batch, device: [batch.task_ids[1].to(device, non_blocking=True)],
    "other dtype": lambda batch, device: [batch.rewards.to(device, torch.float64, non_blocking=True)],
}


@pytest.mark.gpu
@pytest.mark.parametrize("copy", [False, True], ids=["", "fresh"])
@pytest.mark.parametrize("how", list(COPIES))
def test_what_is_sampled_next_does_not_change_a_copy_that_is_under_way(
    gpu: str, how: str, copy: bool
) -> None:
    buffer, twin = buffers("host", "host")
    got = []
    for _ in range(20):
        keep_busy(gpu)
        got.append(COPIES[how](buffer.sample(100, 2, copy=copy), gpu))
        if gpu == "cpu":
            got[-1] = [x.clone() for x in got[-1]]
        for _ in range(3):
            buffer.sample(100, 2, copy=copy)
    for columns in got:
        for x, expected in zip(columns, COPIES[how](twin.sample(100, 2), "cpu"), strict=True):
            assert torch.equal(x.cpu(), expected)
        twin.sample(100, 6)


@pytest.mark.gpu
def test_a_batch_on_the_cpu_is_there_when_it_is_returned(gpu: str) -> None:
    (buffer,) = buffers("host")
    there = buffer.sample(100, 40).to(gpu)
    for round_ in range(10):
        keep_busy(gpu)
        for column in there.columns:
            column.fill_(round_)
        assert all(bool((column == round_).all()) for column in there.to("cpu").columns)


@pytest.mark.gpu
def test_a_buffer_on_the_cpu_waits_for_tensors_of_a_gpu(gpu: str) -> None:
    here, expected = buffers("cpu", "host", steps=0)
    for number in range(20):
        given = step(0, gpu)
        keep_busy(gpu)
        for name, value in step(number, gpu).items():
            given[name].copy_(value)
        here.add(**given)
        expected.add(**step(number))
    assert_same(here.sample(64), expected.sample(64))


@pytest.mark.gpu
def test_an_add_beside_the_updates_changes_no_batch_that_was_sampled_before(gpu: str) -> None:
    """Few transitions, so that each add replaces many that are still to be gathered, and some of the next
    batch are new. The updates' stream is not the one that adds."""
    there, expected = buffers(gpu, "host", capacity=4 * STREAMS)
    updates, got = Captured(lambda x: x, gpu), []
    for number in range(60, 90):
        with updates.queue():
            keep_busy(gpu)
            batch = there.sample(16, 2)
        got.append((batch, expected.sample(16, 2)))
        values = step(number, gpu)
        there.add(**values)
        expected.add(**step(number))
    updates.join()
    for batch, right in got:
        assert_same(batch, right)


@pytest.mark.gpu
def test_a_sample_in_a_stream_that_waits_for_nobody_has_what_was_added_before(gpu: str) -> None:
    there, expected = buffers(gpu, "host", capacity=4 * STREAMS)
    aside = torch.cuda.stream(torch.cuda.Stream()) if gpu == "cuda" else nullcontext()
    got = []
    for number in range(60, 90):
        there.add(**step(number, gpu))
        expected.add(**step(number))
        with aside:
            got.append((there.sample(16, 2), expected.sample(16, 2)))
    if gpu == "cuda":
        torch.cuda.synchronize()
    for batch, right in got:
        assert_same(batch, right)
