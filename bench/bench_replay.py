"""`brc_fast.ReplayBuffer` against other replay buffers on one CPU thread.

    python bench/bench_replay.py [--cases ...] [--workload ...] [--capacity 1000000] [--budget SECONDS]
        [--save NAME]
    python bench/bench_replay.py --device cuda|cpu [--workload ...] [--capacity ...] [--budget ...] [--save]

Buffers run in turns in one process, and the figures are medians of process CPU time, with wall time beside
them. Before a buffer is timed, the transitions that it returns must be transitions that were stored. A buffer
that is not installed, fails or returns something else is listed with its reason.

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

import numpy as np
import torch
from harness import (
    ROOT,
    Clock,
    Differs,
    Missing,
    Parser,
    Results,
    Unavailable,
    header,
    interleave,
    one_core,
    positive,
    told,
    versions,
    wait,
)  # fmt: skip
from native.row_gather import RowGather
from workloads import Workload as Named

from brc_fast import DeviceReplayBuffer, ReplayBuffer
from peers import replay_frames as images
from peers.replay_data import MAX_ROWS, Columns, Mismatch, Workload, flat
from peers.replay_peers import PEERS, Authors, Ours, OursTensors, Peer, filled, shapes

OBSERVATION, ACTION, STREAMS = 67, 24, 64
MIN_CAPACITY = 20_480  # 1024 transitions with wide observations
OURS, LIMIT = Ours.name, "row gather (limit)"
UNIT = "ns per transition"
SLICE = 0.004  # seconds of one buffer's turn
CYCLE = 16  # steps that come again and again


class Provider(NamedTuple):
    """What is timed: a call, and the check that comes first."""

    call: Callable[[], object]
    check: Callable[[], None]


def blamed(missing: Missing) -> Missing:
    """Whatever is wrong with ours fails the result; a peer's costs no more than its own time."""
    return {n: (Differs if n.startswith(OURS) else Unavailable)(told(e)) for n, e in missing.items()}


def timed(
    found: Results, case: str, title: str, providers: Mapping[str, Provider], size: int, missing: Missing,
    seconds: float,
) -> None:  # fmt: skip
    """Checks, times and notes one case of `size` transitions per call."""
    good, missing = dict[str, Callable[[], object]](), dict(missing)
    for name, provider in providers.items():
        try:
            provider.check()
            good[name] = provider.call
        except Exception as error:
            missing[name] = error
    print(f"\n{title}")
    found.found.setdefault("titles", {})[case] = title
    times = interleave(good, seconds, turn=SLICE, timer=time.process_time)
    found.case(case, times, UNIT, size, ours=OURS, missing=blamed(missing))


# ---------------------------------------------------------------- sampling


def sampling(peer: Peer, batches: int, size: int) -> Provider:
    """Sampling `batches` batches of `size`."""

    def check() -> None:
        peer.workload.check(peer.columns(peer.sample(batches, size)))

    return Provider(partial(peer.sample, batches, size), check)


def sampled(
    found: Results, clock: Clock, grid: Mapping[str, tuple[int, int]], work: Workload, gathered: int = 0
) -> None:
    """Batches of several sizes, by case, beside the bare gather of at most so many rows."""
    missing, gather = Missing(), None
    peers = filled((Ours, *PEERS), work, missing)
    try:
        gather = RowGather(work.rows, work.row_bytes, gathered) if gathered else None
    except RuntimeError as error:
        missing[LIMIT] = error
    rows = f"{work.tasks} tasks x {work.rows:,}" if work.tasks > 1 else f"{work.rows:,}"
    for place, (case, (batches, size)) in enumerate(grid.items()):
        title = f"Sampling {batches} x {size} from {rows} transitions, "
        title += f"O={work.observation_size}, A={work.action_size}"
        providers = {name: sampling(peer, batches, size) for name, peer in peers.items()}
        if gather is not None:
            count = batches * size
            providers[LIMIT] = Provider(partial(gather.gather, count), partial(gather.check, count))
        timed(found, case, title, providers, batches * size, missing, clock.left / (len(grid) - place))


def locomotion(found: Results, capacity: int, clock: Clock) -> None:
    grid = {f"{u} x {b}": (u, b) for u, b in ((1, 256), (1, 1024), (2, 1024), (16, 1024))}
    work = Workload(OBSERVATION, ACTION, 1, STREAMS, capacity // STREAMS)
    sampled(found, clock, grid, work, 16 * 1024)


def ten_tasks(found: Results, capacity: int, clock: Clock) -> None:
    """A tenth of the transitions each."""
    work = Workload(OBSERVATION, ACTION, 10, 8, capacity // 10 // 8)
    sampled(found, clock, {"ten tasks": (1, 1024)}, work)


def wide(found: Results, capacity: int, clock: Clock) -> None:
    """A twentieth of the transitions, so that a buffer has as many bytes."""
    work = Workload(1500, ACTION, 1, STREAMS, capacity // 20 // STREAMS)
    sampled(found, clock, {"wide": (1, 1024)}, work, 1024)


def held(shape: Named, capacity: int, cycle: int = 0) -> Workload:
    """What a buffer of a workload holds: as many bytes as in the other cases, in whole cycles."""
    streams = STREAMS if shape.tasks == 1 else 8
    rows = capacity * OBSERVATION // max(OBSERVATION, shape.observation)
    each = cycle or 1
    steps = each * max(1, rows // (shape.tasks * streams * each))
    return Workload(shape.observation, shape.action, shape.tasks, streams, steps, cycle)


def on_workload(shape: Named, found: Results, capacity: int, clock: Clock) -> None:
    sampled(found, clock, {shape.name: (2, shape.batch)}, held(shape, capacity))


# ---------------------------------------------------------------- adding, images, memory, files


def inserting(peer: Peer) -> Callable[[], object]:
    """Adds the next step of all environments; what it needs is prepared here."""
    prepared = itertools.cycle([peer.prepare(step) for step in peer.workload.one_cycle()])
    return lambda: peer.add(next(prepared))


def check_insert(kind: Callable[[Workload], Peer], workload: Workload) -> None:
    """A small buffer of `kind` that was overwritten by `add` more than once must return what was added."""
    steps = max(8, 2048 // workload.lanes)
    peer = kind(Workload(OBSERVATION, ACTION, workload.tasks, workload.streams, steps, cycle=steps + 1))
    add = inserting(peer)
    for _ in range(2 * steps + 3):
        add()
    peer.workload.check(peer.columns(peer.sample(1, 1024)))


def tensors(workload: Workload) -> OursTensors:
    return OursTensors(Ours(workload))


def insert(found: Results, capacity: int, clock: Clock) -> None:
    """One step of 1, 64 and 1024 environments in lockstep to full buffers."""
    grid = (1, 64, 1024)
    for place, count in enumerate(grid):
        share = Clock(clock.left / (len(grid) - place))
        missing, providers = Missing(), dict[str, Provider]()
        steps, cycle = capacity // count, max(16, 2048 // count)
        one_task = Workload(OBSERVATION, ACTION, 1, count, steps, cycle)
        # The authors' buffer takes one transition per task at a time.
        per_environment = Workload(OBSERVATION, ACTION, count, 1, steps, cycle)
        for kind in (Ours, *PEERS):
            work = per_environment if kind is Authors else one_task
            for name, peer in filled((kind,), work, missing).items():
                providers[name] = Provider(inserting(peer), partial(check_insert, kind, work))
                if isinstance(peer, Ours):
                    second = OursTensors(peer)
                    providers[second.name] = Provider(inserting(second), partial(check_insert, tensors, work))
        title = f"Adding a step of {count} environments to {capacity:,} transitions, O={OBSERVATION}"
        timed(found, f"insert {count}", title, providers, count, missing, share.left)
        del providers
        gc.collect()


def atari(found: Results, capacity: int, clock: Clock) -> None:
    """uint8 images of 84 x 84 in stacks of 4, a fortieth of the transitions."""
    count, size = max(2048, capacity // 40), 1024
    missing, providers, bytes_ = Missing(), dict[str, Provider](), dict[str, float]()
    for kind in (images.OursFrames, images.CpprbFrames):
        try:
            buffer = kind(count)
            bytes_[kind.name] = buffer.nbytes / count
            providers[kind.name] = Provider(partial(buffer.sample, size), partial(buffer.check, 256))
        except Exception as error:
            missing[kind.name] = error
    title = f"Sampling 1 x {size} from {count:,} transitions of 4 x 84 x 84 uint8"
    timed(found, "atari", title, providers, size, missing, clock.left)
    bytes_["both stacks, uint8"] = 2 * images.STACK * images.PIXELS + 8 + 4 + 4
    for name, held_bytes in bytes_.items():
        found.add("atari memory", name, "bytes per transition", [held_bytes] * 3)


def memory(found: Results, capacity: int, clock: Clock) -> None:
    """Bytes reserved, against float32 arrays with both observations."""
    work = Workload(OBSERVATION, ACTION, 1, STREAMS, capacity // STREAMS)
    ours = Ours.empty(work).nbytes / work.rows
    for name, held_bytes in ((OURS, ours), ("float32 arrays", work.row_bytes)):
        found.add("memory", name, "bytes per transition", [held_bytes] * 3)


def files(found: Results, capacity: int, clock: Clock) -> None:
    """Saving, loading and saving again after 10,000 further transitions, in turns with numpy.savez."""
    work, numpy = Workload(OBSERVATION, ACTION, 1, STREAMS, capacity // STREAMS), "numpy.savez + numpy.load"
    ours, other, missing = Ours(work), Ours.empty(work), Missing()
    arrays = {
        f"{n}": np.random.default_rng(n).random(s, np.float32) for n, s in enumerate(shapes(work, work.rows))
    }
    for first, steps in work.chunks():
        ours.put(first, steps)
    times: dict[str, dict[str, list[float]]] = {"save": {}, "load": {}, "again": {}}

    def note(what: str, name: str, call: Callable[[], object]) -> None:
        start = time.perf_counter()
        call()
        times[what].setdefault(name, []).append(time.perf_counter() - start)

    def load(path: Path) -> list[object]:
        with np.load(path) as stored:
            return [stored[name] for name in arrays]

    def same() -> None:
        """Both buffers must draw the same, and at first what the workload has stored."""
        one, two = ours.buffer.sample(1024), other.sample(1024)
        if len(other) != len(ours.buffer) or not all(map(torch.equal, one, two)):
            raise Mismatch("what was loaded is not what was saved")
        if "again" not in times or OURS not in times["again"]:
            work.check(ours.columns(two))

    base, took = ROOT / "build" / "bench", 0.0
    base.mkdir(parents=True, exist_ok=True)
    while (OURS not in times["again"] and not missing) or clock.left > took:
        with tempfile.TemporaryDirectory(dir=base) as folder:
            path, start = Path(folder, "replay.npz"), time.perf_counter()
            note("save", numpy, partial(np.savez, path, **arrays))
            note("load", numpy, partial(load, path))
            try:
                note("save", OURS, partial(ours.buffer.save, Path(folder, "ours")))
                note("load", OURS, partial(other.load, Path(folder, "ours")))
                same()
                ours.put(work.steps, work.at(work.steps, 10_000 // work.lanes))
                note("again", OURS, partial(ours.buffer.save, Path(folder, "ours")))
            except Exception as error:
                missing[OURS] = error
                break
            took = time.perf_counter() - start
    for what, own in times.items():
        kept = {name: values for name, values in own.items() if name not in missing}
        found.case(f"files {what}", kept, "s", ours=OURS, missing=blamed(missing))


GROUPS: dict[str, tuple[Callable[[Results, int, Clock], None], float]] = {  # with shares of the budget
    "locomotion": (locomotion, 0.35),
    "ten-tasks": (ten_tasks, 0.1),
    "wide": (wide, 0.1),
    "insert": (insert, 0.25),
    "atari": (atari, 0.08),
    "memory": (memory, 0.0),
    "files": (files, 0.12),
}


# ---------------------------------------------------------------- batches on a device


def on_device(found: Results, shape: Named, capacity: int, device: str, clock: Clock) -> None:
    """Batches of every size (U, B), and steps of all environments, in equal shares of the time."""
    work, before = held(shape, capacity, CYCLE), f"{shape.name}: " if shape.name else ""
    sizes = [(2, shape.batch)] if shape.name else [(1, 1024), (16, 1024)]
    cases = {f"{before}sample {u} x {b} on the device": (u, b) for u, b in sizes}
    ids = [task for task in range(work.tasks) for _ in range(work.streams)]
    arguments: Any = (work.rows, work.observation_size, work.action_size)
    options: Any = {"finish": lambda name: wait(device)}
    try:
        there = DeviceReplayBuffer(*arguments, task_ids=ids, device=device)
        host = ReplayBuffer(*arguments, task_ids=ids)
        for _, chunk in work.chunks():
            for k in range(len(chunk.rewards)):
                step = [column[k] for column in chunk]
                host.add(*step)
                there.add(*step)
        for size in sizes:
            agree(host, there, work, size, device)
    except (MemoryError, torch.OutOfMemoryError, Differs) as error:
        for case in cases:
            missing = dict.fromkeys(("device", "prefetched", "copied"), error)
            found.case(case, {}, UNIT, missing=missing)
        return
    for place, (case, (updates, batch)) in enumerate(cases.items()):
        share, copied = clock.left / (len(cases) + 1 - place), partial(host.sample, batch, updates)
        with host.prefetch(batch, updates, device=device) as batches:
            both = {"device": partial(there.sample, batch, updates), "prefetched": partial(next, batches)}
            times = interleave(both, share * 2 / 3, **options)
        # No thread gathers beside it
        times |= interleave({"copied": lambda draw=copied: draw().to(device)}, share / 3, **options)
        found.case(case, times, UNIT, updates * batch, ours="device")
    steps = [[torch.from_numpy(column).to(device) for column in step] for step in work.one_cycle()]
    ours, theirs = itertools.cycle(steps), itertools.cycle(steps)
    adding = {
        "device": lambda: there.add(*next(ours)),
        "copied": lambda: host.add(*(value.cpu() for value in next(theirs))),
    }
    case = f"{before}add from {work.lanes} environments on the device"
    found.case(case, interleave(adding, clock.left, **options), UNIT, work.lanes, ours="device")


def agree(
    host: ReplayBuffer, there: DeviceReplayBuffer, work: Workload, size: tuple[int, int], device: str
) -> None:
    """Differs where the next batches do, or were never stored; equal seeds draw equal batches."""
    updates, rows = size
    with host.prefetch(rows, updates, device=device) as batches:
        for _ in range(3):
            prefetched, drawn = next(batches), there.sample(rows, updates)
            if not all(torch.equal(a, b) for a, b in zip(prefetched, drawn, strict=True)):
                raise Differs("the buffers return different batches")
            work.check(Columns(*flat(*(field.cpu().numpy() for field in drawn))))


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(120.0, workloads="+", device="batches there, of ours alone")
    parser.add_argument("--cases", nargs="+", choices=tuple(GROUPS), help="default: all, without --workload")
    usual = "transitions in a buffer (default: 1000000, or 200000 where the budget is below a minute)"
    parser.add_argument("--capacity", type=positive, help=usual)
    given = parser.parse_args(words)
    capacity = given.capacity or (1_000_000 if given.budget >= 60 else 200_000)
    if not MIN_CAPACITY <= capacity <= MAX_ROWS:
        parser.error(f"--capacity must lie in {MIN_CAPACITY}..{MAX_ROWS}")
    if given.device and given.cases:
        parser.error("--device knows no --cases; leave them out")
    found, shapes = Results("replay", given.save, capacity=capacity), given.workload or []
    if given.device:
        device = found.found["device"] = parser.device(given)
        torch.set_num_threads(1)
        asked = shapes or [Named("", "the first case", OBSERVATION, ACTION)]
        for shape in asked:
            clock = Clock(given.budget / len(asked))
            on_device(found, shape, capacity, device, clock)
        return found.end()
    one_core()
    found.found["versions"] = header()["versions"] | versions([kind.package for kind in PEERS])
    groups = [GROUPS[name] for name in given.cases or ([] if shapes else GROUPS)]
    groups += [(partial(on_workload, shape), 0.1) for shape in shapes]
    whole = sum(share for _, share in groups) or 1.0
    for group, share in groups:
        group(found, capacity, Clock(given.budget * share / whole))
        gc.collect()
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
