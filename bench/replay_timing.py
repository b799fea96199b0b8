"""Buffers that take turns: the checks before, the times, and the tables of `bench_replay.py`."""

from __future__ import annotations

import itertools
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

from harness import Measurement, absent, measured, median_ratio

from peers.replay_peers import Authors, Cpprb, IndexSelect, Ours, OursTensors, StableBaselines3, TorchRL

SLICE = 0.004  # seconds of one buffer's turn, at least one call
MIN_ROUNDS = 5
OURS, LIMIT, BEST = Ours.name, "row gather (limit)", "best other buffer"

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
