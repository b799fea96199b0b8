"""Compiles row_gather.cpp on demand and measures with it: the limit of any buffer that copies its samples."""

from __future__ import annotations

import ctypes
import mmap
import os
import shutil
import subprocess
import time
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

SOURCE = Path(__file__).resolve().with_suffix(".cpp")
BUILD = SOURCE.parent.parent.parent / "build" / "bench"
HUGE_PAGE = 1 << 21
LINE = 64
AHEAD = (2, 4, 8, 16, 32, 64)
PREFETCHED = (LINE, 4 * LINE, 1 << 10, 4 << 10)


def load() -> ctypes.CDLL:
    """The compiled library, built again when the source is newer. Calls through it release the GIL.

    Raises:
        RuntimeError: there is no C++ compiler (`c++`, or what CXX names), or it refuses the file.
    """
    library = BUILD / "row_gather.so"
    if not library.exists() or library.stat().st_mtime < SOURCE.stat().st_mtime:
        compiler = os.environ.get("CXX", "c++")
        if shutil.which(compiler) is None:
            raise RuntimeError(f"no C++ compiler {compiler!r}; install one or set CXX")
        BUILD.mkdir(parents=True, exist_ok=True)
        part = library.with_suffix(f".{os.getpid()}.so")
        command = [compiler, "-std=c++20", "-O3", "-shared", "-fPIC", "-o", str(part), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)} failed: {done.stderr.strip()}")
        part.replace(library)
    native = ctypes.CDLL(str(library))
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    native.row_gather.argtypes = [pointer, size, pointer, size, size, size, pointer]
    native.row_gather.restype = None
    return native


def huge(nbytes: int) -> NDArray[np.uint8]:
    """Zeroed memory that starts at a 2 MB border, in huge pages where the system grants them."""
    whole = mmap.mmap(-1, nbytes + HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        whole.madvise(mmap.MADV_HUGEPAGE)
    memory = np.frombuffer(whole, np.uint8)
    start = -memory.ctypes.data % HUGE_PAGE
    return memory[start : start + nbytes]


class RowGather:
    """Random rows of one contiguous block, copied to one output that is used again and again.

    The indices are drawn beforehand, the rows start at 64-byte borders, and the prefetch distance is the
    fastest of this machine. A replay buffer also has to draw, to find the rows and to hand out memory.
    """

    def __init__(self, rows: int, row_bytes: int, max_count: int, seed: int = 0) -> None:
        self.row_bytes = -(-row_bytes // LINE) * LINE
        self._native = load()
        self._rows = huge(rows * self.row_bytes)
        self._tags = self._rows.reshape(rows, self.row_bytes)[:, :4].view(np.uint32)
        self._rows.reshape(rows, self.row_bytes)[:] = 1  # every page exists
        self._tags[:, 0] = np.arange(rows)
        self._out = huge(max_count * self.row_bytes)
        total = max(4 * rows, 2 * max_count)
        self._index = np.random.default_rng(seed).integers(0, rows, total, dtype=np.uint32)
        self._next = 0
        self.ahead, self.prefetched = 0, 0
        self._tune(min(1024, max_count))

    def gather(self, count: int) -> NDArray[np.uint8]:
        """The next `count` random rows, [count, row_bytes], valid until the next call."""
        if self._next + count > self._index.size:
            self._next = 0
        self._next += count
        index, rows = self._index[self._next - count : self._next].ctypes.data, self._rows.ctypes.data
        where = self.ahead, self.prefetched, self._out.ctypes.data
        self._native.row_gather(rows, self.row_bytes, index, count, *where)
        return self._out[: count * self.row_bytes].reshape(count, self.row_bytes)

    def check(self, count: int) -> None:
        """Every row that `gather` returns must be the row of its index."""
        start = self._next
        got = self.gather(count)[:, :4].copy().view(np.uint32)[:, 0]
        first = start if start + count <= self._index.size else 0
        if not np.array_equal(got, self._index[first : first + count]):
            raise RuntimeError("the gathered rows are not those of their indices")

    def _tune(self, count: int) -> None:
        """Takes the fastest prefetch distance and length; alternated, the least of several calls of each."""
        sizes = sorted({min(size, self.row_bytes) for size in PREFETCHED})
        settings = [(0, 0), *((ahead, size) for ahead in AHEAD for size in sizes)]
        best = dict.fromkeys(settings, float("inf"))
        calls = max(1, (4 << 20) // (count * self.row_bytes))
        for _ in range(7):
            for setting in settings:
                self.ahead, self.prefetched = setting
                start = time.process_time()
                for _ in range(calls):
                    self.gather(count)
                best[setting] = min(best[setting], (time.process_time() - start) / calls)
        self.ahead, self.prefetched = min(best, key=best.__getitem__)
