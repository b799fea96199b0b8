"""`brc_fast.ReplayBuffer` against other replay buffers on one CPU thread.

    python bench/bench_replay.py [--cases ...] [--workload ...] [--capacity 1000000] [--budget SECONDS]
        [--save NAME]
    python bench/bench_replay.py --device cuda|cpu [--workload ...] [--capacity ...] [--budget ...] [--save]

Figures are medians of process CPU time. Before a buffer is timed, the transitions that it returns must be
transitions that were stored.

--device asks for batches there instead, and times our two buffers: `device` (DeviceReplayBuffer),
`prefetched` (ReplayBuffer, which copies the next batches while the learner has this one) and `copied`
(sampled, then copied). All three must give the same batches. On a CPU nothing is copied.
"""

from __future__ import annotations

import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import harness
import numpy as np
import torch
from harness import ROOT, Clock, Differs, Missing, Parser, Results, Unavailable, interleave, positive
from native.row_gather import RowGather
from workloads import WORKLOADS, Workload

from brc_fast import DeviceReplayBuffer, Field, ReplayBuffer
from peers.replay import KINDS, Peer, Stored, filled, ours

FIRST = Workload("", "the first case", 67, 24)
STREAMS = 64
MIN_CAPACITY = 20_480
OURS, TENSORS, AUTHORS, LIMIT = (
    "brc-fast",
    "brc-fast, tensors",
    "authors' layout (numpy)",
    "row gather (limit)",
)
UNIT = "ns per transition"
SLICE = 0.004  # seconds of one buffer's turn


class Provider(NamedTuple):
    """What is timed: a call, and the check that comes first."""

    call: Callable[[], object]
    check: Callable[[], None]


def blamed(missing: Missing) -> dict[str, Exception]:
    """Whatever is wrong with ours fails the result; a peer's costs no more than its own time."""
    kinds = {name: Differs if name.startswith(OURS) else Unavailable for name in missing}
    return {name: kinds[name](harness.reason(error)) for name, error in missing.items()}


def timed(
    found: Results, case: str, title: str, providers: Mapping[str, Provider], size: int, missing: Missing,
    seconds: float,
) -> None:  # fmt: skip
    """Checks, times and notes one case of `size` transitions per call."""
    good, missing = dict[str, Callable[[], object]](), Missing(missing)
    for name, provider in providers.items():
        with missing.of(name):
            provider.check()
            good[name] = provider.call
    print(f"\n{title}")
    found.found.setdefault("titles", {})[case] = title
    times = interleave(good, seconds, turn=SLICE, timer=time.process_time)
    found.case(case, times, UNIT, size, ours=OURS, missing=blamed(missing))


# ---------------------------------------------------------------- sampling


def sampled(
    found: Results, clock: Clock, grid: Mapping[str, tuple[int, int]], work: Stored, gathered: int = 0
) -> None:
    """Batches of several sizes, by case, beside the bare gather of at most so many rows."""
    missing, calls = Missing(), dict[str, Callable[[int, int], Provider]]()
    for name in (name for name in KINDS if name != TENSORS):
        with missing.of(name):
            peer = filled(name, work)
            shown = name if work.tasks == 1 or KINDS[name].tasks else f"{name} x {work.tasks}"
            calls[shown] = lambda *size, peer=peer: Provider(
                partial(peer.sample, *size), partial(peer.check, *size)
            )
    if gathered:
        with missing.of(LIMIT):
            gather = RowGather(work.rows, work.row_bytes, gathered)
            calls[LIMIT] = lambda u, b: Provider(partial(gather.gather, u * b), partial(gather.check, u * b))
    rows = f"{work.tasks} tasks x {work.rows:,}" if work.tasks > 1 else f"{work.rows:,}"
    for place, (case, size) in enumerate(grid.items()):
        title = (
            f"Sampling {size[0]} x {size[1]} from {rows} transitions, O={work.observation}, A={work.action}"
        )
        providers, share = (
            {name: call(*size) for name, call in calls.items()},
            clock.left / (len(grid) - place),
        )
        timed(found, case, title, providers, size[0] * size[1], missing, share)


def held(shape: Workload, capacity: int) -> Stored:
    """What a buffer of a workload holds: as many bytes as in the first case, and a batch of 1024."""
    streams = STREAMS if shape.tasks == 1 else 8
    rows = max(1024, capacity * FIRST.observation // max(FIRST.observation, shape.observation))
    return Stored(shape.observation, shape.action, shape.tasks, streams, rows // (shape.tasks * streams))


def locomotion(found: Results, capacity: int, clock: Clock) -> None:
    grid = {f"{u} x {b}": (u, b) for u, b in ((1, 256), (1, 1024), (2, 1024), (16, 1024))}
    sampled(found, clock, grid, held(FIRST, capacity), 16 * 1024)


def ten_tasks(found: Results, capacity: int, clock: Clock) -> None:
    """A tenth of the transitions each."""
    sampled(found, clock, {"ten tasks": (1, 1024)}, held(FIRST._replace(tasks=10), capacity))


def wide(found: Results, capacity: int, clock: Clock) -> None:
    sampled(found, clock, {"wide": (1, 1024)}, held(FIRST._replace(observation=1500), capacity), 1024)


def on_workload(shape: Workload, found: Results, capacity: int, clock: Clock) -> None:
    sampled(found, clock, {shape.name: (2, shape.batch)}, held(shape, capacity))


# ---------------------------------------------------------------- adding, memory, files


def inserting(peer: Peer) -> Callable[[], object]:
    """Adds the next step of all environments; what it needs is prepared here."""
    prepared = itertools.cycle([peer.prepare(step) for step in peer.work.each_step()])
    return lambda: peer.add(next(prepared))


def check_insert(name: str, work: Stored) -> None:
    """A small buffer that was overwritten by `add` more than once must return what was added."""
    steps = max(8, 2048 // work.lanes)
    peer = KINDS[name].make(work._replace(steps=steps))
    add = inserting(peer)
    for _ in range(2 * steps + 3):
        add()
    peer.check(1, 1024)


def insert(found: Results, capacity: int, clock: Clock) -> None:
    """One step of 1, 64 and 1024 environments in lockstep to full buffers."""
    grid = (1, 64, 1024)
    for place, count in enumerate(grid):
        share = Clock(clock.left / (len(grid) - place))
        missing, providers = Missing(), dict[str, Provider]()
        work = Stored(FIRST.observation, FIRST.action, 1, count, capacity // count)
        for name in KINDS:
            # The authors' buffer takes one transition per task at a time.
            own = work._replace(tasks=count, streams=1) if name == AUTHORS else work
            with missing.of(name):
                providers[name] = Provider(inserting(filled(name, own)), partial(check_insert, name, own))
        title = f"Adding a step of {count} environments to {capacity:,} transitions, O={FIRST.observation}"
        timed(found, f"insert {count}", title, providers, count, missing, share.left)
        del providers
        gc.collect()


def memory(found: Results, capacity: int, clock: Clock) -> None:
    """Bytes reserved, against arrays with both observations: float32, and stacks of 4 frames in uint8."""
    work, frames = held(FIRST, capacity), max(2048, capacity // 40)
    stacks = ReplayBuffer(frames, Field((84, 84), "uint8", stack=4), Field((), "int64"), task_ids=[0])
    held_bytes = {OURS: ours(work).buffer.nbytes / work.rows, "float32 arrays": work.row_bytes}
    of_frames = {OURS: stacks.nbytes / frames, "both stacks, uint8": 2 * 4 * 84 * 84 + 8 + 4 + 4}
    for case, own in (("memory", held_bytes), ("atari memory", of_frames)):
        for name, value in own.items():
            found.add(case, name, "bytes per transition", [value] * 3, 1)


def files(found: Results, capacity: int, clock: Clock) -> None:
    """Saving, loading and saving again after 10,000 further transitions, in turns with numpy.savez."""
    work, numpy, missing = held(FIRST, capacity), "numpy.savez + numpy.load", Missing()
    mine, other, plain = filled(OURS, work), ours(work), filled(AUTHORS, work)
    add = inserting(mine)
    arrays = {f"{number}": array for number, array in enumerate(plain.buffer)}
    times: dict[str, dict[str, list[float]]] = {"save": {}, "load": {}, "again": {}}

    def note(what: str, name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        times[what].setdefault(name, []).append(time.perf_counter() - start)

    def load(path: Path) -> list[object]:
        with np.load(path) as stored:
            return [stored[name] for name in arrays]

    base, took = ROOT / "build" / "bench", 0.0
    base.mkdir(parents=True, exist_ok=True)
    while not missing and (took == 0.0 or clock.left > took):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=base) as folder, missing.of(OURS):
            path = Path(folder, "replay.npz")
            note("save", numpy, partial(np.savez, path, **arrays))
            note("load", numpy, partial(load, path))
            note("save", OURS, partial(mine.buffer.save, Path(folder, "ours")))
            note("load", OURS, partial(other.buffer.load, Path(folder, "ours")))
            one, two = mine.buffer.sample(1024), other.buffer.sample(1024)
            if len(other.buffer) != len(mine.buffer) or not all(map(torch.equal, one, two)):
                raise Differs("what was loaded is not what was saved")
            work.check(other.columns(two))
            for _ in range(10_000 // work.lanes):
                add()
            note("again", OURS, partial(mine.buffer.save, Path(folder, "ours")))
        took = time.perf_counter() - start
    for what, own in times.items():
        kept = {name: values for name, values in own.items() if name not in missing}
        found.case(f"files {what}", kept, "s", ours=OURS, missing=blamed(missing))


GROUPS: dict[str, tuple[Callable[[Results, int, Clock], None], float]] = {  # with shares of the budget
    "locomotion": (locomotion, 0.4),
    "ten-tasks": (ten_tasks, 0.1),
    "wide": (wide, 0.1),
    "insert": (insert, 0.3),
    "memory": (memory, 0.0),
    "files": (files, 0.1),
}


# ---------------------------------------------------------------- batches on a device


def on_device(found: Results, shape: Workload, capacity: int, device: str, clock: Clock) -> None:
    """Batches of every size (U, B), and steps of all environments, in equal shares of the time."""
    work, before = held(shape, capacity), f"{shape.name}: " if shape.name else ""
    sizes = [(2, shape.batch)] if shape.name else [(1, 1024), (16, 1024)]
    options: Any = {"finish": lambda name: harness.wait(device)}
    host, missing = ours(work), Missing()
    ids = np.repeat(np.arange(work.tasks), work.streams)
    with missing.of("device", "prefetched", "copied"):
        there = DeviceReplayBuffer(work.rows, work.observation, work.action, task_ids=ids, device=device)
        for buffer in (host.buffer, there):
            steps = itertools.cycle(work.each_step())
            for step in itertools.islice(steps, work.steps):
                buffer.add(*step)
        for size in sizes:
            agree(host, there, size, device)
    for place, (updates, batch) in enumerate(sizes):
        case, share = (
            f"{before}sample {updates} x {batch} on the device",
            clock.left / (len(sizes) + 1 - place),
        )
        times = dict[str, list[float]]()
        if not missing:
            with host.buffer.prefetch(batch, updates, device=device) as batches:
                both = {"device": partial(there.sample, batch, updates), "prefetched": partial(next, batches)}
                times = interleave(both, share * 2 / 3, **options)
            # No thread gathers beside it
            copied = {"copied": lambda size=(batch, updates): host.buffer.sample(*size).to(device)}
            times |= interleave(copied, share / 3, **options)
        found.case(case, times, UNIT, updates * batch, ours="device", missing=missing)
    if not missing:
        tensors = [[torch.from_numpy(column).to(device) for column in step] for step in work.each_step()]
        mine, theirs = itertools.cycle(tensors), itertools.cycle(tensors)
        adding = {
            "device": lambda: there.add(*next(mine)),
            "copied": lambda: host.buffer.add(*(value.cpu() for value in next(theirs))),
        }
        case = f"{before}add from {work.lanes} environments on the device"
        found.case(case, interleave(adding, clock.left, **options), UNIT, work.lanes, ours="device")


def agree(host: Peer, there: DeviceReplayBuffer, size: tuple[int, int], device: str) -> None:
    """Differs where the next batches do, or were never stored; equal seeds draw equal batches."""
    with host.buffer.prefetch(size[1], size[0], device=device) as batches:
        for _ in range(3):
            prefetched, drawn = next(batches), there.sample(size[1], size[0])
            if not all(torch.equal(a, b) for a, b in zip(prefetched, drawn, strict=True)):
                raise Differs("the buffers return different batches")
            host.work.check(host.columns(drawn))


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(120.0, workloads="+")
    parser.add_argument("--cases", nargs="+", choices=tuple(GROUPS), help="default: all, without --workload")
    usual = "transitions in a buffer (default: 1000000, or 200000 where the budget is below a minute)"
    parser.add_argument("--capacity", type=positive, help=usual)
    given = parser.parse_args(words)
    capacity = given.capacity or (1_000_000 if given.budget >= 60 else 200_000)
    if capacity < MIN_CAPACITY:
        parser.error(f"--capacity must be at least {MIN_CAPACITY}")
    if given.device and given.cases:
        parser.error("--device knows no --cases; leave them out")
    shapes = [WORKLOADS[name] for name in given.workload or ()]
    found = Results("replay", given.save, capacity=capacity)
    if given.device:
        device = found.found["device"] = parser.device(given)
        torch.set_num_threads(1)
        for shape in (asked := shapes or [FIRST]):
            on_device(found, shape, capacity, device, Clock(given.budget / len(asked)))
        return found.end()
    harness.one_core()
    found.found["versions"] = harness.versions(
        [*harness.PACKAGES, *(kind.package for kind in KINDS.values())]
    )
    groups = [GROUPS[name] for name in given.cases or ([] if shapes else GROUPS)]
    groups += [(partial(on_workload, shape), 0.1) for shape in shapes]
    whole = sum(share for _, share in groups) or 1.0
    for group, share in groups:
        group(found, capacity, Clock(given.budget * share / whole))
        gc.collect()
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
