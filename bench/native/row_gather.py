"""Compiles row_gather.cpp on demand and measures with it: the limit of any buffer that copies its samples."""

from __future__ import annotations

import ctypes
import os
import subprocess
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SOURCE = Path(__file__).resolve().with_suffix(".cpp")
LIBRARY = SOURCE.parents[2] / "build" / "bench" / "row_gather.so"
LINE = 64
SETTINGS = [(0, 0), *((ahead, size) for ahead in (4, 8, 12, 16, 32, 64) for size in (LINE, 1 << 10, 4 << 10))]


def load() -> ctypes.CDLL:
    """The compiled library, built again when the source is newer; CalledProcessError where it cannot be."""
    if not LIBRARY.exists() or LIBRARY.stat().st_mtime < SOURCE.stat().st_mtime:
        LIBRARY.parent.mkdir(parents=True, exist_ok=True)
        part = LIBRARY.with_suffix(f".{os.getpid()}.so")
        options = ["-std=c++20", "-O3", "-shared", "-fPIC"]
        subprocess.run([os.environ.get("CXX", "c++"), *options, "-o", part, SOURCE], check=True)
        part.replace(LIBRARY)
    native = ctypes.CDLL(str(LIBRARY))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    native.row_gather.argtypes = [pointer, size, pointer, size, size, size, pointer]
    native.row_gather.restype = None
    return native


def aligned(rows: int, width: int) -> NDArray[np.uint32]:
    """Rows that begin with a line of the cache, every page of which exists."""
    memory = np.ones(rows * width + LINE // 4, np.uint32)
    first = -memory.ctypes.data % LINE // 4
    return memory[first : first + rows * width].reshape(rows, width)


class RowGather:
    """Random rows of one contiguous block, copied to one output that is used again and again.

    The indices are drawn beforehand, the rows are whole lines of the cache, and the prefetch distance is the
    fastest of this machine. A replay buffer also has to draw, to find the rows and to hand out memory.
    """

    def __init__(self, rows: int, row_bytes: int, most: int) -> None:
        self._native, width = load(), -(-row_bytes // LINE) * LINE // 4
        self._rows, self._out = aligned(rows, width), aligned(most, width)
        self._rows[:, 0] = np.arange(rows)
        total = max(4 * rows, 2 * most)
        self._index, self._next = np.random.default_rng(0).integers(0, rows, total, np.uint32), 0
        count = min(1024, most)
        seconds = {one: min(self._timed(one, count) for _ in range(7)) for one in SETTINGS}
        self.setting = min(seconds, key=seconds.__getitem__)

    def gather(self, count: int) -> NDArray[np.uint32]:
        """The next `count` random rows, [count, row_bytes / 4], valid until the next call."""
        if self._next + count > self._index.size:
            self._next = 0
        self._next += count
        index, row_bytes = self._index[self._next - count : self._next], self._rows.strides[0]
        where = *self.setting, self._out.ctypes.data
        self._native.row_gather(self._rows.ctypes.data, row_bytes, index.ctypes.data, count, *where)
        return self._out[:count]

    def check(self, count: int) -> None:
        """Every row that `gather` returns must be the row of its index."""
        got = self.gather(count)
        if not np.array_equal(got[:, 0], self._index[self._next - count : self._next]):
            raise RuntimeError("the gathered rows are not those of their indices")

    def _timed(self, setting: tuple[int, int], count: int) -> float:
        self.setting, start = setting, time.process_time()
        for _ in range(8):
            self.gather(count)
        return time.process_time() - start
