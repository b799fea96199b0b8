"""What this machine can do at all, for every other figure to stand beside.

    python bench/bench_limits.py [--device cpu|cuda] [--budget SECONDS] [--save NAME]

copy        bytes read and written per second, between buffers that no cache holds
product     operations per second of square matrix products by torch.mm: in float32 on a CPU; in bfloat16,
            tf32 and float32 on a GPU
launch      one operation on one number, called from Python; on a GPU also one more such kernel, which waits
            for the one before, in a CUDA graph
row gather  a random row of a million, of the size of a transition (O=67, A=24): with prefetching on a CPU
            (native/row_gather.cpp), by index_select on a GPU

On a CPU everything runs in one thread unless --threads says otherwise. What has no figure has its reason.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from harness import Better, Measurement, absent, interleave, quartiles, refusal, write
from native.row_gather import RowGather
from torch import Tensor

from brc_fast.kernels.tools.timing import Timing, seconds_per_call
from peers.replay_data import Workload

MACHINE = "machine"  # the provider of every figure
ROW_BYTES = Workload(67, 24, 1, 1, 1).row_bytes
KINDS = {"bfloat16": "highest", "tf32": "high", "float32": "highest"}  # and torch's float32 precision
SQUARES = {"cpu": (256, 512, 1024), "cuda": (1024, 2048, 4096, 8192)}

Calls = Sequence[Callable[[], object]]


class Limit(NamedTuple):
    """One figure: `scale` over the seconds of a call where the unit is a rate, else times these seconds."""

    case: str
    unit: str
    scale: float
    timed: Callable[[float], Timing]  # seconds per call, measured for about so many seconds

    @property
    def better(self) -> Better:
        return "more" if self.unit.endswith("/s") else "less"

    def value(self, seconds: float) -> float:
        return self.scale / seconds if self.better == "more" else self.scale * seconds


# ---------------------------------------------------------------- what is timed


def copied(device: torch.device, dry: bool) -> int:
    """Elements of the buffers of `copies`: 256 MB each, on a GPU a gigabyte."""
    return 2**18 if dry else 2**28 if device.type == "cuda" else 2**26


def copies(device: torch.device, dry: bool) -> Calls:
    """Copies between two pairs of buffers in turn, each larger than a cache."""
    pairs = [torch.randn(2, copied(device, dry), device=device) for _ in range(2)]
    return [partial(pair[0].copy_, pair[1]) for pair in pairs]


def dependent(device: torch.device, count: int) -> Calls:
    """Tiny operations, each on the result of the one before."""
    number = torch.zeros(1, device=device)
    return [partial(number.add_, 1.0)] * count


@contextmanager
def multiplying(kind: str) -> Iterator[torch.dtype]:
    """The dtype of operands for products of this kind, with torch set to it."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(KINDS[kind])
    try:
        yield torch.bfloat16 if kind == "bfloat16" else torch.float32
    finally:
        torch.set_float32_matmul_precision(before)


def product(device: torch.device, kind: str, size: int, seconds: float) -> Timing:
    """Square matrices of this size, four of each in turn."""
    with multiplying(kind) as dtype:
        sets = [torch.randn(3, size, size, device=device).to(dtype) for _ in range(4)]
        calls = [partial(torch.mm, left, right, out=out) for left, right, out in sets]
        return seconds_per_call(calls, device, seconds)


def chain(device: torch.device, count: int, seconds: float) -> Timing:
    """Each waits for the one before; on a GPU all in one graph."""
    return seconds_per_call(dependent(device, count), device, seconds)


def launch(device: torch.device, count: int, seconds: float) -> Timing:
    """Called one after the other from Python, without waiting in between."""
    calls = dependent(device, count)
    times = interleave({"": lambda: [call() for call in calls]}, seconds=seconds, calls=1, device=device.type)
    low, median, high = quartiles([took / count for took in times[""]])
    return Timing(median, low, high, len(times[""]))


def gather(device: torch.device, rows: int, count: int, seconds: float) -> Timing:
    """`count` random rows of `rows`, copied to one output."""
    if device.type == "cpu":
        native = RowGather(rows, ROW_BYTES, count)
        native.check(count)
        return seconds_per_call([partial(native.gather, count)] * 16, device, seconds)
    stored = torch.randn(rows, ROW_BYTES // 4, device=device)
    out = torch.empty(count, stored.shape[1], device=device)
    drawn = torch.randint(rows, (16, count), device=device)
    return seconds_per_call([partial(selected, stored, index, out) for index in drawn], device, seconds)


def selected(stored: Tensor, index: Tensor, out: Tensor) -> Tensor:
    return torch.index_select(stored, 0, index, out=out)


def limits(device: torch.device, dry: bool) -> Iterator[Limit]:
    """Every limit of this device; what needs memory takes it when it is timed."""
    cuda = device.type == "cuda"
    rows, count, launches = (2_000, 64, 20) if dry else (1_000_000, 8192 if cuda else 1024, 1000)

    def copy(seconds: float) -> Timing:
        return seconds_per_call(copies(device, dry), device, seconds)

    yield Limit("copy", "GB/s", 2 * 4 * copied(device, dry) / 1e9, copy)
    for size in (32,) if dry else SQUARES[device.type]:
        for kind in KINDS if cuda or dry else ("float32",):
            work = partial(product, device, kind, size)
            yield Limit(f"product {kind} {size}", "GFLOP/s", 2 * size**3 / 1e9, work)
    yield Limit("launch", "us", 1e6, partial(launch, device, launches))
    if cuda or dry:
        yield Limit("launch in a CUDA graph", "us", 1e6, partial(chain, device, 2 if dry else 100))
    yield Limit("row gather", "ns per row", 1e9 / count, partial(gather, device, rows, count))


# ---------------------------------------------------------------- all of them


def measurement(limit: Limit, seconds: float) -> Measurement:
    """The figure, or the reason why there is none."""
    try:
        timing = limit.timed(seconds)
    except Exception as error:  # of one limit: the others go on
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        return absent(limit.case, MACHINE, told, limit.unit, limit.better)
    low, high = sorted((limit.value(timing.low), limit.value(timing.high)))
    return {
        "case": limit.case,
        "provider": MACHINE,
        "value": limit.value(timing.median),
        "unit": limit.unit,
        "better": limit.better,
        "low": low,
        "high": high,
        "rounds": timing.samples,
        "floor": None,
    }


def run(device: str, seconds: float, dry: bool = False) -> dict[str, Any]:
    """Every limit, in equal shares of the time that is left."""
    end = time.perf_counter() + seconds
    found: list[Measurement] = []
    listed = list(limits(torch.device(device), dry))
    for place, limit in enumerate(listed):
        left = max(0.0, end - time.perf_counter()) / (len(listed) - place)
        found.append(measurement(limit, 0.0 if dry else left))
        print(f"  {line(found[-1])}", flush=True)
        if device == "cuda":
            torch.cuda.empty_cache()
    return {"device": device, "row_bytes": ROW_BYTES, "measurements": found}


def line(told: Measurement) -> str:
    value, spread = "-", told.get("missing", "")
    if told["value"] is not None:
        value, spread = f"{told['value']:.4g}", f"({told['low']:.4g} to {told['high']:.4g})"
    return f"{told['case']:<26}{value:>12} {told['unit']:<12}{spread}"


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds in all")
    parser.add_argument("--save", help="name of a file under bench/results")
    arguments = parser.parse_args(words)
    if (wrong := refusal(arguments)) is not None:
        print(f"bench_limits: {wrong}", file=sys.stderr)
        return 2
    there = torch.cuda.is_available()
    device = arguments.device or ("cuda" if there else "cpu")
    if device == "cuda" and not there:
        print("bench_limits: torch sees no CUDA device", file=sys.stderr)
        return 2
    if device == "cpu":
        torch.set_num_threads(arguments.threads)
    found = run(device, arguments.budget)
    if arguments.save:
        print(write(arguments.save, {"benchmark": "limits", **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
