"""`brc_fast.ReplayBuffer` against other replay buffers on one CPU thread.

    python bench/bench_replay.py [--cases ...] [--workload ...] [--capacity 1000000] [--budget SECONDS]
        [--save NAME]
    python bench/bench_replay.py --device cuda|cpu [--workload ...] [--capacity ...] [--budget ...] [--save]

Buffers run in turns in one process, and the figures are medians of process CPU time, with wall time beside
them. Before a buffer is timed, the transitions that it returns must be transitions that were stored. A buffer
that is not installed, fails or returns something else is listed with its reason.

--device asks for batches there instead, and times our two buffers (replay_device.py); on a CPU it tries the
same code.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import replay_device
import torch
from harness import (
    RESULTS,
    ROOT,
    Lines,
    Measurement,
    absent,
    equality,
    header,
    measured,
    median_ratio,
    refusal,
    write,
)
from native.row_gather import RowGather
from plot_replay import draw
from workloads import WORKLOADS, named
from workloads import Workload as Named

from peers import replay_files as files
from peers import replay_frames as frames
from peers.replay_data import MAX_ROWS, Workload
from peers.replay_peers import (
    PEERS,
    Authors,
    Cpprb,
    IndexSelect,
    Ours,
    OursTensors,
    Peer,
    StableBaselines3,
    TorchRL,
    fill,
    make,
)

OBSERVATION, ACTION = 67, 24
STREAMS = 64
WIDE = 1500
TASKS = 10
MIN_CAPACITY = 20_480  # 1024 transitions with wide observations
SLICE = 0.004  # seconds of one buffer's turn, at least one call
MIN_ROUNDS = 5
OURS, LIMIT, BEST = Ours.name, "row gather (limit)", "best other buffer"

# Share of the budget per group.
SHARES = {
    "locomotion": 0.35,
    "ten-tasks": 0.10,
    "wide": 0.10,
    "insert": 0.25,
    "atari": 0.08,
    "memory": 0.0,
    "files": 0.12,
}
WORKLOAD_SHARE = 0.1

# How many times the time of brc-fast the others should need at least; for the limit, at most what multiple
# of its time brc-fast should need.
GOALS: dict[str, dict[str, float]] = {
    "1 x 1024": {Authors.name: 5.0, Cpprb.name: 4.0, IndexSelect.name: 3.0, TorchRL.name: 8.0, LIMIT: 1.35},
    "2 x 1024": {LIMIT: 1.35},
    "16 x 1024": {Authors.name: 4.0, Cpprb.name: 3.5, LIMIT: 1.35},
    "ten tasks": {Authors.name: 4.5},
    "wide": {BEST: 1.4},
    "insert 64": {Authors.name: 4.0, StableBaselines3.name: 3.5},
    "insert 1": {Authors.name: 1.5},
}


class Times(NamedTuple):
    """Nanoseconds per transition, one value per round."""

    cpu: list[float]
    wall: list[float]


class Provider(NamedTuple):
    """What is timed: a call, the transitions it handles, and the check that comes first."""

    work: Callable[[], object]
    units: int
    check: Callable[[], None]


Missing = dict[str, str]


def measure(providers: Mapping[str, Provider], seconds: float) -> dict[str, Times]:
    """Turns of about SLICE seconds. Each round has another order, so that the neighbours change."""
    calls = {name: _calls(provider.work) for name, provider in providers.items()}
    times = {name: Times([], []) for name in providers}
    order, rng = list(providers), random.Random(0)
    end = time.perf_counter() + seconds
    for rounds in itertools.count():
        if rounds >= MIN_ROUNDS and time.perf_counter() >= end:
            break
        rng.shuffle(order)
        for name in order:
            work, scale = providers[name].work, 1e9 / (calls[name] * providers[name].units)
            wall, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls[name]):
                work()
            cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
            times[name].cpu.append(cpu * scale)
            times[name].wall.append(wall * scale)
    return times


def _calls(work: Callable[[], object]) -> int:
    """Calls per turn, after a warm-up."""
    work()
    start, done = time.perf_counter(), 0
    while done < 3 or (time.perf_counter() - start < SLICE and done < 4096):
        work()
        done += 1
    return max(1, round(SLICE * done / (time.perf_counter() - start)))


def reason(error: Exception) -> str:
    """One line on why a buffer is not timed."""
    return f"{type(error).__name__}: {error}".splitlines()[0]


@contextmanager
def attempt(name: str, missing: Missing) -> Iterator[None]:
    """Notes a failure instead of passing it on."""
    try:
        yield
    except Exception as error:
        missing[name] = reason(error)


def checked(providers: Mapping[str, Provider], missing: Missing) -> dict[str, Provider]:
    """Those that return what was stored."""
    good = {}
    for name, provider in providers.items():
        with attempt(name, missing):
            provider.check()
            good[name] = provider
    return good


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


def ratio_row(times: Mapping[str, Times], name: str, goal: float | None) -> dict[str, Any]:
    """One buffer's line: medians, and its time in that of brc-fast (for the limit the other way round)."""
    row: dict[str, Any] = {
        "buffer": name,
        "cpu": statistics.median(times[name].cpu),
        "wall": statistics.median(times[name].wall),
        "rounds": len(times[name].cpu),
    }
    if OURS not in times or name == OURS:
        return row
    pair = (OURS, name) if name == LIMIT else (name, OURS)
    row["ratio"], *row["quartiles"] = median_ratio(times[pair[0]].cpu, times[pair[1]].cpu)
    row["wall_ratio"] = median_ratio(times[pair[0]].wall, times[pair[1]].wall)[0]
    if goal is not None:
        row["goal"] = f"{'<=' if name == LIMIT else '>='} {goal:g}"
        row["met"] = row["ratio"] <= goal if name == LIMIT else row["ratio"] >= goal
    return row


def timed_case(
    case: str, title: str, providers: Mapping[str, Provider], missing: Missing, seconds: float
) -> dict[str, Any]:
    """Checks, times and prints one case."""
    missing = dict(missing)
    good = checked(providers, missing)
    times = measure(good, seconds) if good else {}
    goals = dict(GOALS.get(case, {}))
    others = [name for name in times if name not in (OURS, LIMIT, OursTensors.name)]
    if BEST in goals and others:
        best = min(others, key=lambda name: statistics.median(times[name].cpu))
        goals[best] = goals.pop(BEST)
    rows = [ratio_row(times, name, goals.get(name)) for name in times]
    result = {"case": case, "title": title, "unit": "ns per transition", "rows": rows, "missing": missing}
    result["open_goals"] = {name: goal for name, goal in goals.items() if name not in times}
    result["measurements"] = timed_measurements(case, "ns per transition", times, missing)
    print_timed(result)
    return result


def timed_measurements(
    case: str, unit: str, times: Mapping[str, Times], missing: Missing
) -> list[Measurement]:
    """CPU time of every buffer; the floor is the bare gather."""
    floor = statistics.median(times[LIMIT].cpu) if LIMIT in times else None
    found = [measured(case, name, values.cpu, unit, "less", floor) for name, values in times.items()]
    return found + [absent(case, name, why, unit, "less", floor) for name, why in missing.items()]


def print_timed(result: Mapping[str, Any]) -> None:
    """One table."""
    print(f"\n{result['title']}, {result['unit']}")
    print(f"  {'buffer':28s} {'CPU':>9s} {'wall':>9s}   {'times brc-fast (quartiles)':38s} {'goal':8s}")
    for row in result["rows"]:
        text = ""
        if "ratio" in row:
            low, high = row["quartiles"]
            text = f"{row['ratio']:7.2f} ({low:.2f} to {high:.2f})"
            if row["buffer"] == LIMIT:
                text = f"brc-fast is {row['ratio']:.2f} of it ({low:.2f} to {high:.2f})"
        print(
            f"  {row['buffer']:28s} {row['cpu']:9.0f} {row['wall']:9.0f}   {text:38s} "
            f"{row.get('goal', ''):8s} {verdict(row)}"
        )
    print_missing(result)


def print_missing(result: Mapping[str, Any]) -> None:
    """What was not measured, and which goals that leaves open."""
    for name, why in result.get("missing", {}).items():
        print(f"  {name:28s} missing: {why}")
    for name, goal in result.get("open_goals", {}).items():
        print(f"  {name:28s} goal {goal:g}: not measured")
    sys.stdout.flush()


def verdict(row: Mapping[str, Any]) -> str:
    """The word for a goal, or nothing where there is none."""
    words = {True: "met", False: "missed", None: "not measured"}
    return words[row["met"]] if "met" in row else ""


def size_row(
    what: str, unit: str, ours: float | None, other: float | None, goal: float | None = None
) -> dict[str, Any]:
    """A line of a table of ours against one other figure; the ratio should be at most `goal`."""
    row: dict[str, Any] = {"what": what, "unit": unit, "ours": ours, "other": other}
    if ours is not None and other:
        row["ratio"] = ours / other
    if goal is not None:
        row["goal"] = f"<= {goal:g}"
        row["met"] = row["ratio"] <= goal if "ratio" in row else None
    return row


def size_measurements(case: str, row: Mapping[str, Any], other: str) -> list[Measurement]:
    """Of a `size_row` whose figures are counts and not times."""
    named = ((OURS, row["ours"]), (other, row["other"]))
    return [measured(case, name, [value], row["unit"], "less") for name, value in named if value is not None]


def print_sizes(result: Mapping[str, Any]) -> None:
    """A table of `size_row`s."""
    print(f"\n{result['title']}")
    print(f"  {'':48s} {'brc-fast':>10s} {'other':>10s} {'ratio':>7s}   goal")
    for row in result["rows"]:
        ours, other, ratio = (
            "" if row.get(key) is None else f"{row[key]:.4g}" for key in ("ours", "other", "ratio")
        )
        print(
            f"  {row['what'] + ', ' + row['unit']:48s} {ours:>10s} {other:>10s} {ratio:>7s}   "
            f"{row.get('goal', ''):8s} {verdict(row)}"
        )
    print_missing(result)


class Clock:
    """The seconds that a group may time for: its share of the budget, less what its set-up took."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.start = seconds, time.perf_counter()

    def per_case(self, left: int) -> float:
        """For each of the cases that are left."""
        return max(0.0, self.seconds - (time.perf_counter() - self.start)) / left


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


def held(shape: Named, capacity: int) -> Workload:
    """The same for `replay_device`."""
    streams, rows = room(shape, capacity)
    return replay_device.stored(shape.observation, shape.action, shape.tasks, streams, rows)


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
        "measurements": size_measurements("atari memory", rows[0], "both stacks, float32"),
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


GROUPS: dict[str, Callable[[int, Clock], list[dict[str, Any]]]] = {
    "locomotion": locomotion,
    "ten-tasks": ten_tasks,
    "wide": wide,
    "insert": insert,
    "atari": atari,
    "memory": memory,
    "files": saved_files,
}


def summary(results: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Every goal by its verdict."""
    verdicts: dict[str, list[str]] = {"met": [], "missed": [], "not measured": []}
    for result in results:
        for row in result["rows"]:
            if "met" in row:
                figure = row.get("ours") if row["goal"].endswith("MB") else row.get("ratio")
                what = f"{row['buffer']}" if "buffer" in row else f"{row['what']}, {row['unit']}"
                text = f"{result['case']}: {what}, goal {row['goal']}"
                verdicts[verdict(row)].append(text if figure is None else f"{text}, is {figure:.3g}")
        for name, goal in result.get("open_goals", {}).items():
            verdicts["not measured"].append(f"{result['case']}: {name}, goal {goal:g}")
    return verdicts


def failures(results: Sequence[Mapping[str, Any]]) -> list[str]:
    """Cases in which ours has no figure, with the reason."""
    pairs = itertools.product(results, (OURS, OursTensors.name))
    return [
        f"{result['case']}, {name}: {result['missing'][name]}"
        for result, name in pairs
        if name in result.get("missing", {})
    ]


def versions() -> dict[str, str | None]:
    """Of the buffers' packages."""
    found: dict[str, str | None] = {}
    for kind in (Ours, *PEERS):
        if kind.package is not None:
            try:
                found[kind.package] = version(kind.package)
            except PackageNotFoundError:
                found[kind.package] = None
    return found


def on_device(device: str, names: Sequence[str], capacity: int, seconds: float) -> dict[str, Any]:
    """Our buffers at the sizes of these workloads, or of the first case, with batches on a device."""
    usual = Named("", "the first case", OBSERVATION, ACTION)
    runs = []
    for shape in [WORKLOADS[name] for name in names] or [usual]:
        sizes = [(2, shape.batch)] if names else [(1, 1024), (16, 1024)]
        share = seconds / max(1, len(names))
        runs.append(replay_device.run(held(shape, capacity), sizes, device, share, shape.name))
    wrong = [run["equality"] for run in runs if run["equality"] != "passed"]
    return {
        "device": device,
        "rows": [row for run in runs for row in run["rows"]],
        "measurements": [entry for run in runs for entry in run["measurements"]],
        "equality": wrong[0] if wrong else equality([]),
    }


def one_thread() -> None:
    """Asks every library for one thread; those that are loaded later read the environment."""
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NPROC"):
        os.environ[name] = "1"
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"
    os.environ["JAX_PLATFORMS"] = "cpu"
    torch.set_num_threads(1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=tuple(GROUPS), help="default: all, without --workload")
    parser.add_argument(
        "--workload", nargs="+", metavar="NAME", default=[], help=f"among {', '.join(WORKLOADS)}"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="batches there, of ours alone")
    parser.add_argument(
        "--capacity",
        type=int,
        help="transitions in a buffer (default: 1000000, or 200000 where the budget is below a minute)",
    )
    parser.add_argument("--budget", type=float, default=120.0, help="seconds; a long set-up comes on top")
    parser.add_argument("--save", help="name of a file under bench/results")
    parser.add_argument(
        "--picture", type=Path, help="draw the batch of 1024, for example docs/replay-cpu.png"
    )
    arguments = parser.parse_args()
    try:
        for name in arguments.workload:
            named(name)
    except ValueError as error:
        print(f"bench_replay: {error}", file=sys.stderr)
        return 2
    if (wrong := refusal(arguments)) is not None:
        print(f"bench_replay: {wrong}", file=sys.stderr)
        return 2
    capacity = arguments.capacity
    if capacity is None:
        capacity = 1_000_000 if arguments.budget >= 60 else 200_000
    if not MIN_CAPACITY <= capacity <= MAX_ROWS:
        print(f"bench_replay: --capacity must lie in {MIN_CAPACITY}..{MAX_ROWS}", file=sys.stderr)
        return 2
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("bench_replay: torch sees no CUDA device; --device cpu runs the same code", file=sys.stderr)
        return 2
    if arguments.device and (arguments.cases or arguments.picture):
        print("bench_replay: --device knows neither --cases nor --picture; leave them out", file=sys.stderr)
        return 2
    if arguments.device:
        torch.set_num_threads(1)
        device_found = on_device(arguments.device, arguments.workload, capacity, arguments.budget)
        if arguments.save:
            print(write(arguments.save, {"benchmark": "replay", "capacity": capacity, **device_found}))
        return 0 if device_found["equality"] == "passed" else 1
    one_thread()
    start = time.perf_counter()
    results: list[dict[str, Any]] = []
    kept = RESULTS / f"{arguments.save}.jsonl"  # what a run that is killed leaves
    lines = Lines(kept, benchmark="replay", capacity=capacity) if arguments.save else None
    cases = arguments.cases or ([] if arguments.workload else list(GROUPS))
    groups = {name: GROUPS[name] for name in cases}
    groups |= {name: partial(on_workload, name) for name in arguments.workload}
    whole = sum(SHARES.get(name, WORKLOAD_SHARE) for name in groups) or 1.0
    for name, group in groups.items():
        found = group(capacity, Clock(arguments.budget * SHARES.get(name, WORKLOAD_SHARE) / whole))
        results += found
        if lines is not None:
            for entry in itertools.chain(*(result["measurements"] for result in found)):
                lines.add("measurements", entry)
        gc.collect()
    verdicts = summary(results)
    print(f"\n{time.perf_counter() - start:.0f} s in all")
    print(f"Goals: {', '.join(f'{len(names)} {word}' for word, names in verdicts.items())}")
    for word in ("missed", "not measured"):
        for name in verdicts[word]:
            print(f"  {word}: {name}")
    content = {
        "benchmark": "replay",
        "capacity": capacity,
        "versions": {**header()["versions"], **versions()},
        "goals": verdicts,
        "measurements": [entry for result in results for entry in result.pop("measurements")],
        "equality": equality(failures(results)),
        "cases": results,
    }
    if lines is not None:
        print(write(arguments.save, content))
        lines.file.close()
        kept.unlink()
    if arguments.picture:
        draw({**header(), **content}, arguments.picture)
        print(arguments.picture)
    if content["equality"] != "passed":
        print(content["equality"], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
