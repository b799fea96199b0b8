"""`brc_fast.ReplayBuffer` against other replay buffers on one CPU thread.

    python bench/bench_replay.py [--cases ...] [--workload ...] [--capacity 1000000] [--budget SECONDS]
        [--save NAME]
    python bench/bench_replay.py --device cuda|cpu [--workload ...] [--capacity ...] [--budget ...] [--save]

Figures are medians of process CPU time. Before a buffer is timed, the transitions that it returns must be
transitions that were stored. Ours that fails this fails the result; a peer loses its own time.

--device asks for batches there instead, and times our two buffers: `device` (DeviceReplayBuffer),
`prefetched` (ReplayBuffer, which copies the next batches while the learner has this one) and `copied`
(sampled, then copied). On a CPU nothing is copied.
"""

from __future__ import annotations

import gc
import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import harness
import numpy as np
import torch
from harness import ROOT, Clock, Differs, Missing, Parser, Results, interleave, positive
from native.row_gather import RowGather
from workloads import WORKLOADS, Workload

from brc_fast import Field, ReplayBuffer
from peers.replay import KINDS, PRIORITIZED, Kind, Peer, Stored, filled, on_device, ours

FIRST = Workload("", "the first case", 67, 24)
STREAMS = 64
MIN_CAPACITY = 20_480
OURS, TENSORS = "brc-fast", "brc-fast, tensors"
AUTHORS, LIMIT = "authors' layout (numpy)", "row gather (limit)"
UNIT = "ns per transition"
SLICE = 0.004  # seconds of one buffer's turn


Provider = tuple[Callable[[], object], Callable[[], None]]  # a call, and the check that comes first


class Case(NamedTuple):
    """`size` transitions per call of each provider."""

    name: str
    title: str
    size: int
    providers: Mapping[str, Provider]
    missing: Missing


Kinds = Mapping[str, Kind]


def held(shape: Workload, capacity: int) -> Stored:
    """What a buffer of a workload holds: as many bytes as in the first case, and a batch of 1024."""
    streams = STREAMS if shape.tasks == 1 else 8
    rows = max(1024, capacity * FIRST.observation // max(FIRST.observation, shape.observation))
    return Stored(shape.observation, shape.action, shape.tasks, streams, rows // (shape.tasks * streams))


# ---------------------------------------------------------------- sampling

Sizes = Mapping[str, tuple[int, int]]  # U and B by case
BATCHES = {f"{u} x {b}": (u, b) for u, b in ((1, 256), (1, 1024), (2, 1024), (16, 1024))}
DEVICE_BATCHES = {f"{u} x {b}": (u, b) for u, b in ((1, 1024), (16, 1024))}
TEN = FIRST._replace(tasks=10)  # a tenth of the transitions each
WIDE = FIRST._replace(observation=1500)


def sampling(shape: Workload, sizes: Sizes, kinds: Kinds, capacity: int) -> Iterator[Case]:
    """Batches of these sizes; where there is one task, beside the bare gather of as many rows."""
    work, missing = held(shape, capacity), Missing()
    calls = dict[str, tuple[Callable[..., object], Callable[..., None]]]()
    for name in (name for name in kinds if name != TENSORS):
        with missing.of(name):
            peer = filled(kinds[name], work)
            shown = name if work.tasks == 1 or kinds[name].tasks else f"{name} x {work.tasks}"
            calls[shown] = peer.sample, peer.check
    if work.tasks == 1 and kinds is KINDS:
        with missing.of(LIMIT):
            calls[LIMIT] = bare(RowGather(work.rows, work.row_bytes, max(u * b for u, b in sizes.values())))
    rows = f"{work.tasks} tasks x {work.rows:,}" if work.tasks > 1 else f"{work.rows:,}"
    for case, (u, b) in sizes.items():
        title = f"Sampling {u} x {b} from {rows} transitions, O={work.observation}, A={work.action}"
        providers: dict[str, Provider] = {
            name: (partial(sample, u, b), partial(check, u, b)) for name, (sample, check) in calls.items()
        }
        yield Case(case, title, u * b, providers, missing)


def by_priority(kinds: Kinds, capacity: int) -> Iterator[Case]:
    """Batches by priority, of which each transition then gets another one."""
    chosen = {name: PRIORITIZED[name] for name in kinds if name in PRIORITIZED}
    for case in sampling(FIRST, {"by priority": (1, 1024)}, chosen, capacity):
        yield case._replace(title=f"{case.title}, by priority, and setting theirs")


def bare(rows: RowGather) -> tuple[Callable[..., object], Callable[..., None]]:
    return lambda u, b: rows.gather(u * b), lambda u, b: rows.check(u * b)


# ---------------------------------------------------------------- adding, memory, files


def inserting(peer: Peer) -> Callable[[], object]:
    """Adds the next step of all environments; what it needs is prepared here."""
    prepared = itertools.cycle([peer.prepare(step) for step in peer.work.each_step()])
    return lambda: peer.add(next(prepared))


def check_insert(kind: Kind, work: Stored) -> None:
    """A small buffer that was overwritten by `add` more than once must return what was added."""
    steps = max(8, 2048 // work.lanes)
    peer = kind.make(work._replace(steps=steps))
    add = inserting(peer)
    for _ in range(2 * steps + 3):
        add()
    peer.check(1, 1024)


def insert(counts: Sequence[int], kinds: Kinds, capacity: int) -> Iterator[Case]:
    """One step of so many environments in lockstep to full buffers."""
    for count in counts:
        missing, providers = Missing(), dict[str, Provider]()
        work = Stored(FIRST.observation, FIRST.action, 1, count, capacity // count)
        for name, kind in kinds.items():
            # The authors' buffer takes one transition per task at a time.
            own = work._replace(tasks=count, streams=1) if name == AUTHORS else work
            with missing.of(name):
                providers[name] = inserting(filled(kind, own)), partial(check_insert, kind, own)
        title = f"Adding a step of {count} environments to {capacity:,} transitions, O={FIRST.observation}"
        yield Case(f"insert {count}", title, count, providers, missing)


def memory(found: Results, capacity: int, seconds: float) -> None:
    """Bytes reserved, against arrays with both observations: float32, and stacks of 4 frames in uint8."""
    work, frames = held(FIRST, capacity), max(2048, capacity // 40)
    stacks = ReplayBuffer(frames, Field((84, 84), "uint8", stack=4), Field((), "int64"), task_ids=[0])
    held_bytes = {OURS: ours(work).buffer.nbytes / work.rows, "float32 arrays": work.row_bytes}
    of_frames = {OURS: stacks.nbytes / frames, "both stacks, uint8": 2 * 4 * 84 * 84 + 8 + 4 + 4}
    for case, own in (("memory", held_bytes), ("atari memory", of_frames)):
        for name, value in own.items():
            found.add(case, name, "bytes per transition", [value] * 3, 1)


def files(found: Results, capacity: int, seconds: float) -> None:
    """Saving, loading and saving again after 10,000 further transitions, in turns with numpy.savez."""
    clock, work, numpy, missing = Clock(seconds), held(FIRST, capacity), "numpy.savez + numpy.load", Missing()
    mine, other = filled(KINDS[OURS], work), ours(work)
    add, arrays = (
        inserting(mine),
        {f"{n}": array for n, array in enumerate(filled(KINDS[AUTHORS], work).buffer)},
    )
    times: dict[str, dict[str, list[float]]] = {"save": {}, "load": {}, "again": {}}

    def note(what: str, name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        times[what].setdefault(name, []).append(time.perf_counter() - start)

    def load(path: Path) -> list[object]:
        with np.load(path) as stored:
            return [stored[name] for name in arrays]

    def turn(folder: Path) -> None:
        note("save", numpy, partial(np.savez, folder / "replay.npz", **arrays))
        note("load", numpy, partial(load, folder / "replay.npz"))
        note("save", OURS, partial(mine.buffer.save, folder / "ours"))
        note("load", OURS, partial(other.buffer.load, folder / "ours"))
        if len(other.buffer) != len(mine.buffer):
            raise Differs("what was loaded is not what was saved")
        other.check(1, 1024)
        for _ in range(10_000 // work.lanes):
            add()
        note("again", OURS, partial(mine.buffer.save, folder / "ours"))

    base = ROOT / "build" / "bench"
    base.mkdir(parents=True, exist_ok=True)
    with missing.of(OURS):
        while not times["again"] or clock.left > 0.0:
            with tempfile.TemporaryDirectory(dir=base) as folder:
                turn(Path(folder))
    for what, own in times.items():
        kept = {name: values for name, values in own.items() if name not in missing}
        found.case(f"files {what}", kept, "s", ours=OURS, missing=missing)


Group = Callable[[Kinds, int], Iterator[Case]]
GROUPS: dict[str, Group] = {
    "locomotion": partial(sampling, FIRST, BATCHES),
    "ten-tasks": partial(sampling, TEN, {"ten tasks": (1, 1024)}),
    "wide": partial(sampling, WIDE, {"wide": (1, 1024)}),
    "by-priority": by_priority,
    "insert": partial(insert, (1, 64, 1024)),
}
OTHERS = {"memory": memory, "files": files}
CASES = {"locomotion": 4, "insert": 3}  # one in every other group


def run(found: Results, cases: Iterable[Case], seconds: float, ours: str, device: str | None = None) -> None:
    """Every case, each in so many seconds."""
    for case in cases:
        timed(found, case, seconds, ours, device)
        del case  # with its buffers
        gc.collect()


def timed(found: Results, case: Case, seconds: float, ours: str, device: str | None) -> None:
    """Checks, times and notes a case: CPU time of the process, or time on a device."""
    good, missing = dict[str, Callable[[], object]](), Missing(case.missing)
    for name, (call, check) in case.providers.items():
        with missing.of(name):
            check()
            good[name] = call
    print(f"\n{case.title}")
    found.found.setdefault("titles", {})[case.name] = case.title
    if device is None:
        times = interleave(good, seconds, turn=SLICE, timer=time.process_time)
    else:
        times = interleave(good, seconds, finish=lambda name: harness.wait(device))
    found.case(case.name, times, UNIT, case.size, ours=ours, missing=missing)


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(120.0, workloads="+")
    names = (*GROUPS, *OTHERS)
    parser.add_argument("--cases", nargs="+", choices=names, help="default: all, without --workload")
    usual = "transitions in a buffer (default: 1000000, or 200000 where the budget is below a minute)"
    parser.add_argument("--capacity", type=positive, help=usual)
    given = parser.parse_args(words)
    capacity = given.capacity or (1_000_000 if given.budget >= 60 else 200_000)
    if capacity < MIN_CAPACITY:
        parser.error(f"--capacity must be at least {MIN_CAPACITY}")
    if given.device and given.cases:
        parser.error("--device knows no --cases; leave them out")
    shapes = [WORKLOADS[name] for name in given.workload or ()]
    groups: list[Group] = [partial(sampling, shape, {shape.name: (2, shape.batch)}) for shape in shapes]
    found = Results("replay", given.save, judged=OURS, capacity=capacity)
    if given.device:
        device = found.found["device"] = parser.device(given)
        torch.set_num_threads(1)
        found.judged = ""
        seconds = given.budget / (len(groups) or 3)
        for group in groups or [partial(sampling, FIRST, DEVICE_BATCHES), partial(insert, (STREAMS,))]:
            run(found, group(on_device(device), capacity), seconds, "device", device)
        return found.end()
    harness.use_cores()
    asked = given.cases or (() if shapes else names)
    seconds = given.budget / (len(groups) + sum(CASES.get(name, 1) for name in asked))
    for group in [*(GROUPS[name] for name in asked if name in GROUPS), *groups]:
        run(found, group(KINDS, capacity), seconds, OURS)
    for name in (name for name in asked if name in OTHERS):
        OTHERS[name](found, capacity, seconds)
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
