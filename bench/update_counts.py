"""Kernels of one update on a GPU, counted by the profiler, for `bench_update.py`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from update_providers import BUILDERS, OURS, release
from update_timing import WARMUP, Pair, repeated

MARK = "spin_kernel"  # what torch.cuda._sleep launches


def between(names: Sequence[str], mark: str = MARK) -> list[list[str]]:
    """What ran between the first mark and the second, the third and the fourth, ..."""
    parts: list[list[str]] = []
    inside = False
    for name in names:
        if mark in name:
            inside = not inside
            parts += [[]] if inside else []
        elif inside:
            parts[-1].append(name)
    return parts


def counts(names: Sequence[str], updates: int) -> dict[str, float]:
    """Kernels, and copies and fills of memory, per update."""
    moved = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": (len(names) - moved) / updates, "copies": moved / updates}


def count_kernels(pairs: Sequence[Pair], deadline: float) -> None:
    """Profile one call of ours at each size: the replay of a graph, with the copies of its inputs.

    In one session for all: a second one may see nothing once graphs were captured after the first.
    """
    from torch.profiler import ProfilerActivity, profile

    def mark() -> None:
        torch.cuda._sleep(1000)
        torch.cuda.synchronize()

    ours = [(pair, name) for pair in pairs for name in OURS if name in pair.times]
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for pair, name in ours:
            if time.perf_counter() > deadline:
                break
            provider = BUILDERS[name](pair.subject)
            repeated(provider, WARMUP["cuda"])
            mark()
            repeated(provider, 1)
            mark()
            del provider
            release("cuda")
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    for (pair, name), launched in zip(ours, between(names), strict=False):
        pair.kernels[name] = counts(launched, pair.subject.updates)
