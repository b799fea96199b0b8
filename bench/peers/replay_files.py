"""Saving and loading: numpy.savez of plain arrays, and what a call takes in time, files and memory."""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from .replay_data import Array, Mismatch, Workload, flat
from .replay_peers import Ours


class Cost(NamedTuple):
    """Of one call. `extra_bytes` is the peak of resident memory above both its start and its end."""

    wall: float
    cpu: float
    extra_bytes: int


def status(key: str) -> int:
    """A line of /proc/self/status in bytes; 0 where there is none."""
    path = Path("/proc/self/status")
    found = re.search(rf"^{key}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.exists() else None
    return int(found[1]) * 1024 if found else 0


def trimmed_rss() -> int:
    """Resident bytes after free memory went back to the system."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    return status("VmRSS")


def reset_peak() -> bool:
    """Asks the kernel to forget the peak of resident memory; False if it refuses."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def cost(work: Callable[[], object]) -> Cost:
    """Runs `work` once. Dirty pages of what came before are written out first."""
    os.sync()
    before = trimmed_rss()
    exact = reset_peak()
    peak, stop = [before], threading.Event()

    def watch() -> None:
        while not stop.wait(0.002):
            peak[0] = max(peak[0], status("VmRSS"))

    watcher = threading.Thread(target=watch)
    if not exact:
        watcher.start()
    wall, cpu = time.perf_counter(), time.process_time()
    kept = work()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if not exact:
        stop.set()
        watcher.join()
    highest = status("VmHWM") if exact else peak[0]
    extra = highest - max(before, trimmed_rss())
    del kept
    return Cost(wall, cpu, max(0, extra))


class PlainFiles:
    """The stored data as five arrays in one .npz file, as numpy.savez writes it: no fsync, no checks."""

    name = "numpy.savez + numpy.load"

    def __init__(self, workload: Workload) -> None:
        rows = workload.rows * workload.tasks
        wide, narrow = (rows, workload.observation_size), (rows, workload.action_size)
        names = ("observations", "actions", "rewards", "masks", "next_observations")
        shapes = (wide, narrow, rows, rows, wide)
        self.arrays = {name: np.empty(shape, np.float32) for name, shape in zip(names, shapes, strict=True)}
        for first, steps in workload.chunks():
            columns = flat(*steps)
            columns[3:5] = [1.0 - columns[3]]
            part = slice(first * workload.lanes, first * workload.lanes + len(columns[0]))
            for name, column in zip(names, columns, strict=True):
                self.arrays[name][part] = column

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        np.savez(folder / "replay.npz", **self.arrays)

    def load(self, folder: Path) -> dict[str, Array]:
        with np.load(folder / "replay.npz") as stored:
            return {name: stored[name] for name in self.arrays}

    def check(self, folder: Path) -> None:
        """What is loaded must be what was saved."""
        for name, array in self.load(folder).items():
            if not np.array_equal(array, self.arrays[name]):
                raise Mismatch(f"{name} differ after numpy.load")


class OurFiles:
    """A full buffer and an empty one of the same arguments, which loads what the first one saves."""

    name = Ours.name

    def __init__(self, workload: Workload) -> None:
        self.source = Ours(workload)
        for first, steps in workload.chunks():
            self.source.put(first, steps)
        self.target = Ours.empty(workload)
        self.grown = False

    def save(self, folder: Path) -> None:
        self.source.buffer.save(folder)

    def load(self, folder: Path) -> None:
        self.target.load(folder)

    def grow(self, rows: int) -> None:
        """Adds about so many further transitions."""
        workload, self.grown = self.source.workload, True
        self.source.put(workload.steps, workload.at(workload.steps, rows // workload.lanes))

    def check(self) -> None:
        """After `load`, both buffers must draw the same, and what the workload has stored until they grow."""
        if len(self.target) != len(self.source.buffer):
            raise Mismatch(f"{len(self.target)} of {len(self.source.buffer)} transitions were loaded")
        one, two = self.source.buffer.sample(1024), self.target.sample(1024)
        for name, saved, loaded in zip(one._fields, one, two, strict=True):
            if not torch.equal(saved, loaded):
                raise Mismatch(f"{name} differ after load")
        if not self.grown:
            self.source.workload.check(self.source.columns(two))
