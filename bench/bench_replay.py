"""`brc_fast.ReplayBuffer` against other replay buffers on one CPU thread.

    python bench/bench_replay.py [--cases ...] [--workload ...] [--capacity 1000000] [--budget SECONDS]
        [--save NAME]
    python bench/bench_replay.py --device cuda|cpu [--workload ...] [--capacity ...] [--budget ...] [--save]

Buffers run in turns in one process, and the figures are medians of process CPU time, with wall time beside
them. Before a buffer is timed, the transitions that it returns must be transitions that were stored. A buffer
that is not installed, fails or returns something else is listed with its reason.

--device asks for batches there instead, and times our two buffers: `device` (DeviceReplayBuffer), `prefetched`
(ReplayBuffer, which copies the next batches while the learner has this one) and `copied` (sampled, then
copied). All three must give the same batches. On a CPU the same code runs, and nothing is copied.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import (
    ROOT,
    Clock,
    Differs,
    Parser,
    Results,
    Times,
    header,
    interleave,
    one_core,
    positive,
    versions,
    wait,
)
from native.row_gather import RowGather
from workloads import WORKLOADS, named
from workloads import Workload as Named

from brc_fast import DeviceReplayBuffer, ReplayBuffer
from peers import replay_frames as images
from peers.replay_data import MAX_ROWS, Columns, Mismatch, Workload, flat
from peers.replay_peers import PEERS, Authors, Ours, OursTensors, Peer, filled, shapes

OBSERVATION, ACTION, STREAMS, WIDE, TASKS = 67, 24, 64, 1500, 10
MIN_CAPACITY = 20_480  # 1024 transitions with wide observations
OURS, LIMIT = Ours.name, "row gather (limit)"
UNIT = "ns per transition"
SLICE = 0.004  # seconds of one buffer's turn
CYCLE = 16  # steps that come again and again
SHARES = {
    "locomotion": 0.35,
    "ten-tasks": 0.1,
    "wide": 0.1,
    "insert": 0.25,
    "atari": 0.08,
    "memory": 0.0,
    "files": 0.12,
}

Missing = dict[str, BaseException]


class Provider(NamedTuple):
    """What is timed: a call, and the check that comes first."""

    call: Callable[[], object]
    check: Callable[[], None]


def timed(
    found: Results,
    case: str,
    title: str,
    providers: Mapping[str, Provider],
    size: int,
    missing: Missing,
    seconds: float,
) -> None:
    """Checks, times and notes one case of `size` transitions per call."""
    good, missing = dict[str, Callable[[], object]](), dict(missing)
    for name, provider in providers.items():
        try:
            provider.check()
            good[name] = provider.call
        except Exception as error:
            missing[name] = (
                Differs(f"{type(error).__name__}: {error}") if isinstance(error, Mismatch) else error
            )
    times = interleave(good, seconds, turn=SLICE) if good else Times([])
    print(f"\n{title}")
    found.found.setdefault("titles", {})[case] = title
    found.case(case, times.cpu, UNIT, size, ours=OURS, missing=missing)
    for entry in found.entries[-len(times) - len(missing) :]:
        if entry["value"] is not None:
            entry["wall"] = 1e9 * statistics.median(times[entry["provider"]]) / size  # type: ignore[typeddict-unknown-key]


# ---------------------------------------------------------------- sampling


def sampling(peers: Mapping[str, Peer], batches: int, size: int) -> dict[str, Provider]:
    """Sampling `batches` batches of `size`."""

    def check(peer: Peer) -> None:
        peer.workload.check(peer.columns(peer.sample(batches, size)))

    return {
        name: Provider(partial(peer.sample, batches, size), partial(check, peer))
        for name, peer in peers.items()
    }


def sampled(
    found: Results, clock: Clock, grid: Mapping[str, tuple[int, int]], work: Workload, gathered: int = 0
) -> None:
    """Batches of several sizes, by case, beside the bare gather of at most so many rows."""
    missing: Missing = {}
    peers = filled((Ours, *PEERS), work, missing)
    gather = None
    try:
        gather = RowGather(work.rows, work.row_bytes, gathered) if gathered else None
    except RuntimeError as error:
        missing[LIMIT] = error
    tasks = f"{work.tasks} tasks x " if work.tasks > 1 else ""
    for place, (case, (batches, size)) in enumerate(grid.items()):
        sizes = f"O={work.observation_size}, A={work.action_size}"
        title = f"Sampling {batches} x {size} from {tasks}{work.rows:,} transitions, {sizes}"
        providers, count = sampling(peers, batches, size), batches * size
        if gather is not None:
            providers[LIMIT] = Provider(partial(gather.gather, count), partial(gather.check, count))
        timed(found, case, title, providers, count, missing, clock.share(len(grid) - place))
    if gather is not None:
        found.found.setdefault("limit", {})[case] = gather.settings()


def locomotion(found: Results, capacity: int, clock: Clock) -> None:
    grid = {f"{u} x {b}": (u, b) for u, b in ((1, 256), (1, 1024), (2, 1024), (16, 1024))}
    sampled(found, clock, grid, Workload(OBSERVATION, ACTION, 1, STREAMS, capacity // STREAMS), 16 * 1024)


def ten_tasks(found: Results, capacity: int, clock: Clock) -> None:
    """A tenth of the transitions each."""
    sampled(
        found,
        clock,
        {"ten tasks": (1, 1024)},
        Workload(OBSERVATION, ACTION, TASKS, 8, capacity // TASKS // 8),
    )


def wide(found: Results, capacity: int, clock: Clock) -> None:
    """A twentieth of the transitions, so that a buffer has as many bytes."""
    sampled(
        found, clock, {"wide": (1, 1024)}, Workload(WIDE, ACTION, 1, STREAMS, capacity // 20 // STREAMS), 1024
    )


def on_workload(shape: Named, found: Results, capacity: int, clock: Clock) -> None:
    """Two batches of a named workload, from as many bytes as the other cases have."""
    streams, rows = room(shape, capacity)
    steps = max(1, rows // shape.tasks // streams)
    work = Workload(shape.observation, shape.action, shape.tasks, streams, steps)
    sampled(found, clock, {shape.name: (2, shape.batch)}, work)


def room(shape: Named, capacity: int) -> tuple[int, int]:
    """Environments of each task, and transitions of all."""
    rows = capacity * OBSERVATION // max(OBSERVATION, shape.observation)
    return STREAMS if shape.tasks == 1 else 8, rows


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
        share, missing, providers = Clock(clock.share(len(grid) - place)), Missing(), dict[str, Provider]()
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
    missing, providers, held = Missing(), dict[str, Provider](), dict[str, float]()
    for kind in (images.OursFrames, images.CpprbFrames):
        try:
            buffer = kind(count)
        except Exception as error:
            missing[kind.name] = error
            continue
        held[kind.name] = buffer.nbytes / count
        providers[kind.name] = Provider(partial(buffer.sample, size), partial(buffer.check, 256))
    title = f"Sampling 1 x {size} from {count:,} transitions of 4 x 84 x 84 uint8"
    timed(found, "atari", title, providers, size, missing, clock.left)
    both = 2 * images.STACK * images.PIXELS + 8 + 4 + 4
    exact(found, "atari memory", {**held, "both stacks, uint8": both})


def memory(found: Results, capacity: int, clock: Clock) -> None:
    """Bytes reserved, against float32 arrays with both observations."""
    work = Workload(OBSERVATION, ACTION, 1, STREAMS, capacity // STREAMS)
    exact(found, "memory", {OURS: Ours.empty(work).nbytes / work.rows, "float32 arrays": work.row_bytes})


def exact(found: Results, case: str, figures: Mapping[str, float]) -> None:
    """Counts, which have no spread."""
    for name, figure in figures.items():
        found.add({
            "case": case, "provider": name, "value": figure, "unit": "bytes per transition", "better": "less",
            "low": figure, "high": figure, "rounds": 1, "floor": None,
        })  # fmt: skip
    found.store()


def files(found: Results, capacity: int, clock: Clock) -> None:
    """Saving, loading and saving again after 10,000 further transitions, in turns with numpy.savez."""
    work = Workload(OBSERVATION, ACTION, 1, STREAMS, capacity // STREAMS)
    names = ("observations", "actions", "rewards", "masks", "next_observations")
    arrays = [np.empty(shape, np.float32) for shape in shapes(work, work.rows)]
    ours, other = Ours(work), Ours.empty(work)
    for first, steps in work.chunks():
        ours.put(first, steps)
        columns = flat(*steps)
        columns[3:5] = [1.0 - columns[3]]
        for array, column in zip(arrays, columns, strict=True):
            array[first * work.lanes :][: len(column)] = column
    times: dict[str, dict[str, list[float]]] = {"save": {}, "load": {}, "again": {}}

    def note(what: str, name: str, call: Callable[[], object]) -> object:
        start = time.perf_counter()
        result = call()
        times[what].setdefault(name, []).append(time.perf_counter() - start)
        return result

    def read(path: Path) -> list[np.ndarray[Any, Any]]:
        with np.load(path) as stored:
            return [stored[name] for name in names]

    base = ROOT / "build" / "bench"
    base.mkdir(parents=True, exist_ok=True)
    numpy, missing, start, grown = "numpy.savez + numpy.load", Missing(), 0.0, 0
    while not grown or (clock.left > time.perf_counter() - start and not missing):
        start = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=base) as folder:
            path = Path(folder, "replay.npz")
            note("save", numpy, lambda path=path: np.savez(path, **dict(zip(names, arrays, strict=True))))
            loaded: Any = note("load", numpy, partial(read, path))
            assert all(np.array_equal(a, b) for a, b in zip(loaded, arrays, strict=True))
            del loaded
            try:
                note("save", OURS, partial(ours.buffer.save, Path(folder, "ours")))
                note("load", OURS, partial(other.load, Path(folder, "ours")))
                same(ours, other, work if not grown else None)
                ours.put(work.steps, work.at(work.steps, 10_000 // work.lanes))
                note("again", OURS, partial(ours.buffer.save, Path(folder, "ours")))
            except Exception as error:
                missing[OURS] = Differs(f"Mismatch: {error}") if isinstance(error, Mismatch) else error
            grown += 1
    for what, own in times.items():
        kept = {name: values for name, values in own.items() if name not in missing}
        found.case(f"files {what}", kept, "s", ours=OURS, missing=missing)


def same(ours: Ours, other: ReplayBuffer, work: Workload | None) -> None:
    """Both buffers must draw the same, and what the workload has stored."""
    one, two = ours.buffer.sample(1024), other.sample(1024)
    if len(other) != len(ours.buffer) or not all(map(torch.equal, one, two)):
        raise Mismatch("what was loaded is not what was saved")
    if work is not None:
        work.check(ours.columns(two))


GROUPS: dict[str, Callable[[Results, int, Clock], None]] = {
    "locomotion": locomotion,
    "ten-tasks": ten_tasks,
    "wide": wide,
    "insert": insert,
    "atari": atari,
    "memory": memory,
    "files": files,
}


# ---------------------------------------------------------------- batches on a device


def on_device(
    found: Results, shape: Named, sizes: Sequence[tuple[int, int]], capacity: int, device: str, seconds: float
) -> None:
    """Batches of every size (U, B), and steps of all environments, in equal shares of the time."""
    clock, before = Clock(seconds), f"{shape.name}: " if shape.name else ""
    streams, rows = room(shape, capacity)
    cycles = max(1, rows // (shape.tasks * streams * CYCLE))
    work = Workload(shape.observation, shape.action, shape.tasks, streams, cycles * CYCLE, CYCLE)
    cases = {
        f"{before}sample {updates} x {batch} on the device": (updates, batch) for updates, batch in sizes
    }
    ids = [task for task in range(work.tasks) for _ in range(work.streams)]
    arguments = work.rows, work.observation_size, work.action_size
    finish = partial(wait, device)
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
            found.case(case, {}, UNIT, missing=dict.fromkeys(("device", "prefetched", "copied"), error))
        return
    for place, (case, (updates, batch)) in enumerate(cases.items()):
        share = clock.share(len(cases) + 1 - place)
        with host.prefetch(batch, updates, device=device) as batches:
            work_of: dict[str, Callable[[], object]] = {
                "device": partial(there.sample, batch, updates),
                "prefetched": partial(next, batches),
            }
            times: dict[str, list[float]] = {**interleave(work_of, share * 2 / 3, finish=lambda _: finish())}
        # No thread gathers beside it
        alone = {"copied": lambda size=(batch, updates): host.sample(*size).to(device)}
        times |= interleave(alone, share / 3, finish=lambda _: finish())
        found.case(case, times, UNIT, updates * batch, ours="device")
    steps = [[torch.from_numpy(column).to(device) for column in step] for step in work.one_cycle()]
    ours, theirs = itertools.cycle(steps), itertools.cycle(steps)
    adding = {
        "device": lambda: there.add(*next(ours)),
        "copied": lambda: host.add(*(value.cpu() for value in next(theirs))),
    }
    times = interleave(adding, clock.left, finish=lambda _: finish())
    found.case(
        f"{before}add from {work.lanes} environments on the device", times, UNIT, work.lanes, ours="device"
    )


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
            try:
                work.check(Columns(*flat(*(field.cpu().numpy() for field in drawn))))
            except Mismatch as error:
                raise Differs(f"{error}") from None


# ---------------------------------------------------------------- all of them


def groups(given: Any) -> Iterator[tuple[Callable[[Results, int, Clock], None], float]]:
    """What was asked for, with its share of the budget."""
    chosen = given.cases or ([] if given.workload else list(GROUPS))
    shares = [(GROUPS[name], SHARES[name]) for name in chosen]
    shares += [(partial(on_workload, shape), 0.1) for shape in given.workload]
    whole = sum(share for _, share in shares) or 1.0
    yield from ((group, given.budget * share / whole) for group, share in shares)


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.add_argument("--cases", nargs="+", choices=tuple(GROUPS), help="default: all, without --workload")
    parser.add_argument(
        "--workload", nargs="+", metavar="NAME", default=[], help=f"among {', '.join(WORKLOADS)}"
    )
    parser.device("batches there, of ours alone")
    told = "transitions in a buffer (default: 1000000, or 200000 where the budget is below a minute)"
    parser.add_argument("--capacity", type=positive, help=told)
    parser.budget(120.0, "seconds; a long set-up comes on top")
    given = parser.parse_args(words)
    capacity = given.capacity or (1_000_000 if given.budget >= 60 else 200_000)
    if not MIN_CAPACITY <= capacity <= MAX_ROWS:
        parser.error(f"--capacity must lie in {MIN_CAPACITY}..{MAX_ROWS}")
    try:
        given.workload = [named(name) for name in given.workload]
    except ValueError as error:
        parser.error(f"{error}")
    found = Results("replay", given.save, capacity=capacity)
    if given.device:
        device = parser.device_of(given)
        if given.cases:
            parser.error("--device knows no --cases; leave them out")
        torch.set_num_threads(1)
        found.found["device"] = device
        for shape in given.workload or [Named("", "the first case", OBSERVATION, ACTION)]:
            sizes = [(2, shape.batch)] if shape.name else [(1, 1024), (16, 1024)]
            on_device(found, shape, sizes, capacity, device, given.budget / max(1, len(given.workload)))
        return found.end()
    one_core()
    found.found["versions"] = header()["versions"] | versions([kind.package for kind in PEERS])
    for group, seconds in groups(given):
        group(found, capacity, Clock(seconds))
        gc.collect()
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
