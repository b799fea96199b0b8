"""What `bench_replay.py` compares: sampling, adding, images, memory and files, one function per group."""

from __future__ import annotations

import gc
import itertools
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from harness import ROOT, Measurement, absent, measured
from native.row_gather import RowGather
from replay_timing import (
    LIMIT,
    OURS,
    Clock,
    Missing,
    Provider,
    attempt,
    print_sizes,
    reason,
    size_measurements,
    size_row,
    timed_case,
)
from workloads import WORKLOADS
from workloads import Workload as Named

from peers import replay_files as files
from peers import replay_frames as frames
from peers.replay_data import Workload
from peers.replay_peers import PEERS, Authors, Ours, OursTensors, Peer, fill, make

OBSERVATION, ACTION = 67, 24
STREAMS = 64
WIDE = 1500
TASKS = 10


def built(workload: Workload, missing: Missing, others: tuple[type[Peer], ...] = PEERS) -> dict[str, Peer]:
    """The filled buffers by their names, ours first."""
    peers: dict[str, Peer] = {}
    for kind in (Ours, *others):
        with attempt(kind.name, missing):
            peer = make(kind, workload)
            peers[peer.name] = peer

    def failed(peer: Peer, error: Exception) -> None:
        missing[peer.name] = reason(error)
        del peers[peer.name]

    fill(list(peers.values()), failed)
    return peers


def sampling(peers: Mapping[str, Peer], batches: int, size: int) -> dict[str, Provider]:
    """Sampling `batches` batches of `size`."""

    def provider(peer: Peer) -> Provider:
        def check() -> None:
            peer.workload.check(peer.columns(peer.sample(batches, size)))

        return Provider(lambda: peer.sample(batches, size), batches * size, check)

    return {name: provider(peer) for name, peer in peers.items()}


def limit(gather: RowGather | None, count: int) -> dict[str, Provider]:
    """The bare gather of `count` rows."""
    if gather is None:
        return {}
    return {LIMIT: Provider(lambda: gather.gather(count), count, lambda: gather.check(count))}


def gather_of(workload: Workload, count: int, missing: Missing) -> RowGather | None:
    """The limit for rows like those of `workload` with both observations."""
    with attempt(LIMIT, missing):
        return RowGather(workload.rows, workload.row_bytes, count)
    return None


def locomotion(capacity: int, clock: Clock) -> list[dict[str, Any]]:
    """One task, 64 environments, batches of several sizes."""
    work = Workload(OBSERVATION, ACTION, 1, STREAMS, capacity // STREAMS)
    missing: Missing = {}
    gather = gather_of(work, 16 * 1024, missing)
    peers = built(work, missing)
    results = []
    grid = [(1, 256), (1, 1024), (2, 1024), (16, 1024)]
    for left, (batches, size) in zip(range(len(grid), 0, -1), grid, strict=True):
        title = f"Sampling {batches} x {size} from {work.rows:,} transitions, O={OBSERVATION}, A={ACTION}"
        providers = {**sampling(peers, batches, size), **limit(gather, batches * size)}
        seconds = clock.per_case(left)
        results.append(timed_case(f"{batches} x {size}", title, providers, missing, seconds))
    if gather is not None:
        results[0]["limit"] = gather.settings()
    return results


def ten_tasks(capacity: int, clock: Clock) -> list[dict[str, Any]]:
    """Ten tasks with a tenth of the transitions each."""
    streams = 8
    work = Workload(OBSERVATION, ACTION, TASKS, streams, capacity // TASKS // streams)
    missing: Missing = {}
    peers = built(work, missing)
    title = f"Sampling 1 x 1024 from {TASKS} tasks x {work.rows:,} transitions, O={OBSERVATION}, A={ACTION}"
    return [timed_case("ten tasks", title, sampling(peers, 1, 1024), missing, clock.per_case(1))]


def wide(capacity: int, clock: Clock) -> list[dict[str, Any]]:
    """Wide observations; a twentieth of the transitions, so that a buffer has as many bytes."""
    work = Workload(WIDE, ACTION, 1, STREAMS, capacity // 20 // STREAMS)
    missing: Missing = {}
    gather = gather_of(work, 1024, missing)
    peers = built(work, missing)
    providers = {**sampling(peers, 1, 1024), **limit(gather, 1024)}
    title = f"Sampling 1 x 1024 from {work.rows:,} transitions, O={WIDE}, A={ACTION}"
    result = timed_case("wide", title, providers, missing, clock.per_case(1))
    return [{**result, "limit": gather.settings() if gather else None}]


def room(shape: Named, capacity: int) -> tuple[int, int]:
    """Environments of each task, and transitions of all: as many bytes as the other cases have."""
    streams = STREAMS if shape.tasks == 1 else 8
    return streams, capacity * OBSERVATION // max(OBSERVATION, shape.observation)


def on_workload(name: str, capacity: int, clock: Clock) -> list[dict[str, Any]]:
    """Two batches of a named workload, from as many bytes as the other cases have."""
    shape = WORKLOADS[name]
    streams, rows = room(shape, capacity)
    steps = max(1, rows // shape.tasks // streams)
    work = Workload(shape.observation, shape.action, shape.tasks, streams, steps)
    missing: Missing = {}
    peers = built(work, missing)
    title = (
        f"{name}: sampling 2 x {shape.batch} from {shape.tasks} x {work.rows:,} transitions, "
        f"O={shape.observation}, A={shape.action}"
    )
    return [timed_case(name, title, sampling(peers, 2, shape.batch), missing, clock.per_case(1))]


def inserting(peer: Peer, positions: Iterator[int] | None = None) -> Callable[[], object]:
    """Adds the next step of all environments; what it needs is prepared here."""
    prepared = [peer.prepare(step) for step in peer.workload.one_cycle()]
    positions = positions or itertools.cycle(range(len(prepared)))
    return lambda: peer.add(prepared[next(positions)])


def check_insert(kind: Callable[[Workload], Peer], workload: Workload) -> None:
    """A small buffer of `kind` that was overwritten by `add` more than once must return what was added."""
    steps = max(8, 2048 // workload.lanes)
    peer = kind(Workload(OBSERVATION, ACTION, workload.tasks, workload.streams, steps, cycle=steps + 1))
    add = inserting(peer)
    for _ in range(2 * steps + 3):
        add()
    peer.workload.check(peer.columns(peer.sample(1, 1024)))


def insert_providers(environments: int, capacity: int, missing: Missing) -> dict[str, Provider]:
    """Adding one step of all environments to full buffers."""
    steps, cycle = capacity // environments, max(16, 2048 // environments)
    one_task = Workload(OBSERVATION, ACTION, 1, environments, steps, cycle)
    # The authors' buffer takes one transition per task at a time.
    per_environment = Workload(OBSERVATION, ACTION, environments, 1, steps, cycle)
    providers: dict[str, Provider] = {}

    def include(peer: Peer, kind: Callable[[Workload], Peer], positions: Iterator[int]) -> None:
        work, workload = inserting(peer, positions), peer.workload
        providers[peer.name] = Provider(work, environments, lambda: check_insert(kind, workload))

    for kind in (Ours, *PEERS):
        with attempt(kind.name, missing):
            peer = kind(per_environment if kind is Authors else one_task)
            for first, chunk in peer.workload.chunks():
                peer.put(first, chunk)
            peer.finish()
            positions = itertools.cycle(range(cycle))
            include(peer, kind, positions)
            if isinstance(peer, Ours):
                include(OursTensors(peer), lambda small: OursTensors(Ours(small)), positions)
    return providers


def insert(capacity: int, clock: Clock) -> list[dict[str, Any]]:
    """1, 64 and 1024 environments in lockstep."""
    results = []
    grid = (1, 64, 1024)
    for left, environments in zip(range(len(grid), 0, -1), grid, strict=True):
        share = Clock(clock.per_case(left))
        missing: Missing = {}
        providers = insert_providers(environments, capacity, missing)
        title = f"Adding a step of {environments} environments to {capacity:,} transitions, O={OBSERVATION}"
        results.append(timed_case(f"insert {environments}", title, providers, missing, share.per_case(1)))
        providers.clear()
        gc.collect()
    return results


def atari(capacity: int, clock: Clock) -> list[dict[str, Any]]:
    """uint8 images of 84 x 84 in stacks of 4, a fortieth of the transitions."""
    count = max(2048, capacity // 40)
    missing: Missing = {}
    providers: dict[str, Provider] = {}
    sizes = {}
    size = 1024
    for kind in (frames.OursFrames, frames.CpprbFrames, frames.CpprbPlainFrames):
        with attempt(kind.name, missing):
            buffer = kind(count)
            sizes[kind.name] = buffer.bytes_per_row
            providers[kind.name] = Provider(
                lambda buffer=buffer: buffer.sample(size), size, lambda buffer=buffer: buffer.check(256)
            )
    title = f"Sampling 1 x {size} from {count:,} transitions of 4 x 84 x 84 uint8"
    timed = timed_case("atari", title, providers, missing, clock.per_case(1))
    plain = 2 * frames.STACK * frames.PIXELS + 8 + 4 + 4
    ours = sizes.pop(OURS, None)
    rows = [size_row("both stacks", "bytes per transition", ours, plain, 0.15)]
    rows += [size_row(name, "bytes per transition", ours, other) for name, other in sizes.items()]
    result = {
        "case": "atari memory",
        "title": "Memory of 4 x 84 x 84 uint8 stacks",
        "rows": rows,
        "measurements": size_measurements("atari memory", rows[0], "both stacks, uint8"),
    }
    print_sizes(result)
    return [timed, result]


def memory(capacity: int, clock: Clock) -> list[dict[str, Any]]:
    """Bytes reserved, against float32 arrays with both observations."""
    work = Workload(OBSERVATION, ACTION, 1, STREAMS, capacity // STREAMS)
    missing: Missing = {}
    peers = built(work, missing, ())
    ours = peers[OURS].buffer.nbytes / work.rows if peers else None
    row = size_row("memory", "bytes per transition", ours, work.row_bytes, 0.62)
    title = f"Memory of {work.rows:,} transitions, O={OBSERVATION}, A={ACTION}; other: float32 arrays"
    entries = size_measurements("memory", row, "float32 arrays")
    result = {"case": "memory", "title": title, "rows": [row], "missing": missing, "measurements": entries}
    print_sizes(result)
    return [result]


def saved_files(capacity: int, clock: Clock) -> list[dict[str, Any]]:
    """Saving, loading and saving again after 10,000 further transitions."""
    work = Workload(OBSERVATION, ACTION, 1, STREAMS, capacity // STREAMS)
    missing: Missing = {}
    base = ROOT / "build" / "bench"
    base.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=base))
    try:
        costs = file_costs(work, folder, clock, missing)
    finally:
        shutil.rmtree(folder)
    result = {
        "case": "files",
        "title": f"Files of {work.rows:,} transitions, O={OBSERVATION}; other: {files.PlainFiles.name}",
        "rows": file_rows(costs),
        "missing": missing,
        "costs": {name: [cost._asdict() for cost in values] for name, values in costs.items()},
        "measurements": file_measurements(costs, missing),
    }
    print_sizes(result)
    return [result]


def file_costs(work: Workload, folder: Path, clock: Clock, missing: Missing) -> dict[str, list[files.Cost]]:
    """Ours and numpy's in turns: at least once, then as long as there is time."""
    plain, ours = files.PlainFiles(work), None
    with attempt(OURS, missing):
        ours = files.OurFiles(work)
    costs: dict[str, list[files.Cost]] = {}

    def note(name: str, call: Callable[[], object]) -> None:
        costs.setdefault(name, []).append(files.cost(call))

    for turn in itertools.count():
        start, place = time.perf_counter(), folder / str(turn)
        note("plain save", partial(plain.save, place / "plain"))
        note("plain load", partial(plain.load, place / "plain"))
        if turn == 0:
            plain.check(place / "plain")
        if ours is not None and OURS not in missing:
            with attempt(OURS, missing):
                note("ours save", partial(ours.save, place / "ours"))
                note("ours load", partial(ours.load, place / "ours"))
                ours.check()
                ours.grow(10_000)
                note("ours again", partial(ours.save, place / "ours"))
        shutil.rmtree(place)
        if clock.per_case(1) < time.perf_counter() - start:
            break
    return {name: spent for name, spent in costs.items() if name.startswith("plain") or OURS not in missing}


def file_measurements(costs: Mapping[str, list[files.Cost]], missing: Missing) -> list[Measurement]:
    """Wall seconds of every save and load."""
    who = {"ours": OURS, "plain": files.PlainFiles.name}
    found = []
    for name, values in costs.items():
        maker, what = name.split()
        found.append(measured(f"files {what}", who[maker], [cost.wall for cost in values], "s", "less"))
    for name, why in missing.items():
        found += [absent(f"files {what}", name, why, "s", "less") for what in ("save", "load", "again")]
    return found


def file_rows(costs: Mapping[str, list[files.Cost]]) -> list[dict[str, Any]]:
    """Medians of what the files took."""

    def median(who: str, what: str, key: str) -> float | None:
        values = costs.get(f"{who} {what}")
        return statistics.median(getattr(cost, key) for cost in values) if values else None

    rows = []
    for key, unit in (("wall", "s wall"), ("cpu", "s CPU")):
        save, load = (median("ours", what, key) for what in ("save", "load"))
        plain_save, plain_load = (median("plain", what, key) or 0.0 for what in ("save", "load"))
        both = None if save is None or load is None else save + load
        again = median("ours", "again", key)
        rows += [
            size_row("save + load", unit, both, plain_save + plain_load, 0.7),
            size_row("save", unit, save, plain_save),
            size_row("load", unit, load, plain_load),
            size_row("save of 10k more (other: our full save)", unit, again, save, 0.1),
        ]
    for what in ("save", "load"):
        ours, other = (median(who, what, "extra_bytes") for who in ("ours", "plain"))
        megabytes = None if ours is None else ours / 2**20
        row = size_row(f"extra resident memory, {what}", "MB", megabytes, (other or 0.0) / 2**20)
        rows.append(row | {"goal": "<= 64 MB", "met": None if megabytes is None else megabytes <= 64})
    return rows
