"""Batches on the learner's device: from a buffer there, prefetched from the host, and copied from there.

device      brc_fast.DeviceReplayBuffer
prefetched  brc_fast.ReplayBuffer, which copies the next batches while the learner has this one
copied      the same, sampled and then copied

And steps of environments whose tensors lie on the device: added there, or copied to the host and added. On a
CPU the same code runs, and nothing is copied. Before anything is timed, all three must give the same batches,
and these must hold transitions that were stored.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from harness import Measurement, absent, equality, interleave, measured
from torch import Tensor

from brc_fast import Batch, DeviceReplayBuffer, ReplayBuffer
from peers.replay_data import Columns, Mismatch, Workload, flat

UNIT = "ns per transition"
SAMPLERS, ADDERS = ("device", "prefetched", "copied"), ("device", "copied")
CYCLE = 16  # steps that come again and again
COMPARED = 3  # batches
CALLS = 20  # of a provider in a round


def stored(observation: int, action: int, tasks: int, streams: int, transitions: int) -> Workload:
    """What the buffers hold: so many transitions of all tasks together, in whole cycles."""
    cycles = max(1, transitions // (tasks * streams * CYCLE))
    return Workload(observation, action, tasks, streams, cycles * CYCLE, CYCLE)


def filled(work: Workload, device: str) -> tuple[ReplayBuffer, DeviceReplayBuffer]:
    """The same transitions on the host and on the device; equal seeds draw equal batches.

    Raises:
        MemoryError: the device has no room.
    """
    ids = [task for task in range(work.tasks) for _ in range(work.streams)]
    sizes = work.rows, work.observation_size, work.action_size
    there = DeviceReplayBuffer(*sizes, task_ids=ids, device=device)
    host = ReplayBuffer(*sizes, task_ids=ids)
    for _, chunk in work.chunks():
        for k in range(len(chunk.rewards)):
            step = [column[k] for column in chunk]
            host.add(*step)
            there.add(*step)
    return host, there


def differences(
    host: ReplayBuffer, there: DeviceReplayBuffer, work: Workload, size: tuple[int, int], device: str
) -> str | None:
    """What differs between the next batches, or was never stored."""
    updates, rows = size
    with host.prefetch(rows, updates, device=device) as batches:
        for _ in range(COMPARED):
            prefetched, drawn = next(batches), there.sample(rows, updates)
            if not all(torch.equal(a, b) for a, b in zip(prefetched, drawn, strict=True)):
                return "the buffers return different batches"
            try:
                work.check(columns(drawn))
            except Mismatch as error:
                return str(error)
    return None


def columns(batch: Batch) -> Columns:
    return Columns(*flat(*(field.cpu().numpy() for field in batch)))


def copied(host: ReplayBuffer, rows: int, updates: int, device: str) -> Batch:
    return host.sample(rows, updates).to(device)


def added(add: Callable[..., None], steps: Iterator[Sequence[Tensor]], kind: str) -> None:
    """The next step of all environments, taken to this kind of device."""
    add(*(value.to(kind) for value in next(steps)))


def run(
    work: Workload, sizes: Sequence[tuple[int, int]], device: str, seconds: float, name: str = ""
) -> dict[str, Any]:
    """Batches of every size (U, B), and steps of all environments, in equal shares of the time.

    name: of the workload, before each case.
    """
    before = f"{name}: " if name else ""
    cases = [f"{before}sample {updates} x {rows} on the device" for updates, rows in sizes]
    adding = f"{before}add from {work.lanes} environments on the device"
    found: dict[str, Any] = {
        "capacity": work.rows * work.tasks,
        "streams": work.lanes,
        "device": device,
        "rows": [],
        "equality": equality([]),
    }

    def without(reason: str) -> list[Measurement]:
        pairs = [*itertools.product(cases, SAMPLERS), *((adding, who) for who in ADDERS)]
        return [absent(case, who, reason, UNIT, "less") for case, who in pairs]

    try:
        host, there = filled(work, device)
    except (MemoryError, torch.OutOfMemoryError) as error:
        print(f"  {before}{error}", flush=True)
        return {**found, "measurements": without(str(error))}
    for case, size in zip(cases, sizes, strict=True):
        if (wrong := differences(host, there, work, size, device)) is not None:
            return {**found, "equality": equality([f"{case}: {wrong}"]), "measurements": without(wrong)}
    entries: list[Measurement] = []
    share = seconds / (len(sizes) + 1)

    def note(case: str, times: dict[str, list[float]], transitions: int) -> None:
        each = {who: [1e9 * took / transitions for took in values] for who, values in times.items()}
        entries.extend(measured(case, who, values, UNIT, "less") for who, values in each.items())
        medians = {who: statistics.median(values) for who, values in each.items()}
        found["rows"].append({"case": case, "nanoseconds_per_transition": medians})
        told = ", ".join(f"{who} {value:.1f}" for who, value in medians.items())
        print(f"  {case}, {UNIT}: {told}", flush=True)

    for case, (updates, rows) in zip(cases, sizes, strict=True):
        with host.prefetch(rows, updates, device=device) as batches:
            work_of: dict[str, Callable[[], object]] = {
                "device": partial(there.sample, rows, updates),
                "prefetched": partial(next, batches),
            }
            times: dict[str, list[float]] = {}
            times |= interleave(work_of, seconds=share * 2 / 3, calls=CALLS, device=device)
        alone = {"copied": partial(copied, host, rows, updates, device)}  # no thread gathers beside it
        times |= interleave(alone, seconds=share / 3, calls=CALLS, device=device)
        note(case, times, updates * rows)
    steps = [[torch.from_numpy(column).to(device) for column in step] for step in work.one_cycle()]
    work_of = {
        "device": partial(added, there.add, itertools.cycle(steps), device),
        "copied": partial(added, host.add, itertools.cycle(steps), "cpu"),
    }
    note(adding, interleave(work_of, seconds=share, calls=CALLS, device=device), work.lanes)
    return {**found, "measurements": entries}
