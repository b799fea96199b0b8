"""Seconds per call, as a CUDA graph replays it: what the work itself takes, without Python and its launches.

All calls are captured one after the other into one graph, several rounds of them where they are short, so
that a replay lasts long against its own launch. The calls are the same work on different buffers, together
larger than the L2 cache: no call finds its inputs there. Where there is no CUDA, the calls are made one by
one and timed by the clock.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from ..runtime.capture import capture
from .cases import Case

__all__ = ["PARAMETERS", "Timing", "batches_of", "cold", "rotated", "seconds_per_call"]

Call = Callable[[], object]
CACHES = 4  # what rotates is this many times as large as the L2 cache
SETS = (2, 16)
LARGEST = 2**30  # bytes moved by one call: more takes longer and tells nothing new
BATCHES = (4096, 256)  # one that fills a GPU, one that does not
PARAMETERS = 1024  # of the optimizer's cases, per row of a batch
OPTIMIZER = (132_813, 4096)  # 136 and 4 million parameters
CALLS_PER_GRAPH = 128  # at most
REPLAY_SECONDS = 5e-4  # how long a replay should take, at least
SAMPLE_SECONDS = 2e-3
SAMPLES = (3, 100)


class Timing(NamedTuple):
    """Seconds per call: the median and the quartiles of the samples, and how many they were."""

    median: float
    low: float
    high: float
    samples: int


def _cache(device: torch.device) -> int:
    """Bytes of the L2 cache; of a usual one where torch does not tell."""
    if device.type != "cuda":
        return 0
    return int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)) or 32 * 2**20


def _sets(moved: int, device: torch.device) -> int:
    """How many sets of buffers to rotate for calls that move this many bytes each."""
    wanted = math.ceil(CACHES * _cache(device) / max(1, moved))
    return min(max(wanted, SETS[0]), SETS[1])


def cold(moved: int, device: torch.device) -> bool:
    """Whether the sets of `rotated` are too large together to stay in the L2 cache."""
    return _sets(moved, device) * moved >= 2 * _cache(device)


def batches_of(case: Case) -> list[int]:
    """The batch sizes to time a case at, the largest first.

    Those of an op that is not the optimizer's are halved until a call moves a gigabyte at most.
    """
    if case.op in ("adamw_", "ema_"):
        return list(OPTIMIZER)
    sizes = []
    for batch in BATCHES:
        while case.bytes(batch) > LARGEST and batch > 1:
            batch //= 2
        sizes.append(batch)
    return list(dict.fromkeys(sizes))


def rotated(case: Case, device: torch.device, batch: int, impl: str, sets: int | None = None) -> list[Call]:
    """The call of a case on several sets of inputs; those of set i are the same for every `impl`."""
    calls = []
    for seed in range(_sets(case.bytes(batch), device) if sets is None else sets):
        torch.manual_seed(seed)
        calls.append(case.prepare(device, batch, impl))
    return calls


def seconds_per_call(calls: Sequence[Call], device: torch.device, seconds: float = 0.1) -> Timing:
    """Time these calls in rotation for about `seconds`, after warming each up (which compiles what it needs).

    Calls may allocate, differentiate and change their own inputs in place. RuntimeError on CUDA for a call
    that waits for the device, which no graph can capture.
    """
    sample = _on_cuda(calls) if device.type == "cuda" else _on_the_host(calls)
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < SAMPLES[0] or (time.perf_counter() < end and len(times) < SAMPLES[1]):
        times.append(sample())
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(statistics.median(times), low, high, len(times))


def _on_the_host(calls: Sequence[Call]) -> Callable[[], float]:
    for call in calls:
        call()

    def sample() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    return sample


@cache
def _stream(device: int) -> torch.cuda.Stream:
    """One for all timings: each has its own cache of memory and its own workspace for products."""
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]


def _on_cuda(calls: Sequence[Call]) -> Callable[[], float]:
    stream = _stream(torch.cuda.current_device())
    stream.wait_stream(torch.cuda.current_stream())
    before = torch.cuda.get_sync_debug_mode()
    with torch.cuda.stream(stream):
        for mode in (before, "error"):  # a capture that fails would leave its traces in the allocator
            torch.cuda.set_sync_debug_mode(mode)
            try:
                for call in calls:
                    call()
            finally:
                torch.cuda.set_sync_debug_mode(before)
    rounds = 1
    graph = _captured(calls, rounds, stream)
    once = _replayed(graph, 1, stream)
    if once < REPLAY_SECONDS:
        rounds = max(1, min(math.ceil(REPLAY_SECONDS / once), CALLS_PER_GRAPH // len(calls)))
        if rounds > 1:
            del graph  # and with it the memory of its results
            graph = _captured(calls, rounds, stream)
            once = _replayed(graph, 1, stream)
    replays = math.ceil(SAMPLE_SECONDS / once)
    return lambda: _replayed(graph, replays, stream) / (replays * rounds * len(calls))


def _captured(calls: Sequence[Call], rounds: int, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    results: list[object] = [None] * len(calls)

    def run() -> None:
        for _ in range(rounds):
            for place, call in enumerate(calls):
                # The results of the other calls stay, so that no two sets write to the same memory.
                results[place] = None
                results[place] = call()

    with torch.cuda.stream(stream):
        return capture(run, stream)[0]


def _replayed(graph: torch.cuda.CUDAGraph, replays: int, stream: torch.cuda.Stream) -> float:
    """Seconds that this many replays take on the device."""
    with torch.cuda.stream(stream):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        graph.replay()  # keeps the device busy while the host queues the others
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
    return max(float(start.elapsed_time(end)) * 1e-3, 1e-7)
