"""What this machine can do at all, for every other figure to stand beside.

    python bench/bench_limits.py [--device cpu|cuda] [--budget SECONDS] [--save NAME] [--dry]

copy        bytes read and written per second, between buffers that no cache holds
product     operations per second of square matrix products by torch.mm: in float32 on a CPU; in bfloat16,
            tf32 and float32 on a GPU
launch      one operation on one number, called from Python; on a GPU also one more such kernel, which waits
            for the one before, in a CUDA graph
row gather  a random row of a million, of the size of a transition (O=67, A=24): with prefetching on a CPU
            (native/row_gather.cpp), by index_select on a GPU

On a CPU everything runs in one thread. What has no figure has its reason.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import NamedTuple

import harness
import torch
from harness import Missing, Parser, Results, Seconds, Summary, shares
from native.row_gather import RowGather

from brc_fast.kernels.tools.timing import seconds_per_call

MACHINE = "machine"  # the provider of every figure
ROW_BYTES = 4 * (2 * 67 + 24 + 2)  # a transition with both observations, reward and mask
SQUARES = {"cpu": (256, 512, 1024), "cuda": (1024, 2048, 4096, 8192)}
Calls = Sequence[Callable[[], object]]


class Limit(NamedTuple):
    """One figure: `scale` units of work by each call."""

    case: str
    unit: str
    scale: float
    make: Callable[[], Calls]
    timed_on: str  # "cuda": all calls in one graph


def limits(device: str, dry: bool) -> Iterator[Limit]:
    """Every limit of this device."""
    cuda = device == "cuda"
    elements = 2**18 if dry else 2**28 if cuda else 2**26  # of buffers: 256 MB each, on a GPU a gigabyte
    rows, count, launches = (2_000, 64, 20) if dry else (1_000_000, 8192 if cuda else 1024, 1000)

    def copies() -> Calls:
        pairs = [torch.randn(2, elements, device=device) for _ in range(2)]
        return [partial(pair[0].copy_, pair[1]) for pair in pairs]

    def products(kind: str, size: int) -> Calls:
        dtype = torch.bfloat16 if kind == "bfloat16" else torch.float32
        harness.tensor_cores(device, "high" if kind == "tf32" else "highest")
        sets = [torch.randn(3, size, size, device=device).to(dtype) for _ in range(4)]
        return [partial(torch.mm, left, right, out=out) for left, right, out in sets]

    def dependent(number: int) -> Calls:
        return [partial(torch.zeros(1, device=device).add_, 1.0)] * number

    def gathers() -> Calls:
        if not cuda:
            native = RowGather(rows, ROW_BYTES, count)
            native.check(count)
            return [partial(native.gather, count)] * 16
        stored = torch.randn(rows, ROW_BYTES // 4, device=device)
        out, drawn = stored[:count].clone(), torch.randint(rows, (16, count), device=device)
        return [partial(torch.index_select, stored, 0, index, out=out) for index in drawn]

    yield Limit("copy", "GB/s", 2 * 4 * elements / 1e9, copies, device)
    for size in (32,) if dry else SQUARES[device]:
        for kind in ("bfloat16", "tf32", "float32") if cuda or dry else ("float32",):
            case, operations = f"product {kind} {size}", 2 * size**3
            yield Limit(case, "GFLOP/s", operations / 1e9, partial(products, kind, size), device)
    yield Limit("launch", "us", 1, lambda: [*dependent(launches), partial(harness.wait, device)], "cpu")
    if cuda or dry:
        chain = partial(dependent, 2 if dry else 100)
        yield Limit("launch in a CUDA graph", "us", 1, chain, device)
    yield Limit("row gather", "ns per row", count, gathers, device)


def measure(found: Results, listed: Sequence[Limit], seconds: float) -> None:
    """Every limit, in equal shares of the time that is left; of one that fails the reason."""
    for limit, clock in shares(listed, seconds):
        times, missing = dict[str, Seconds](), Missing()
        with missing.of(MACHINE):
            took = seconds_per_call(limit.make(), torch.device(limit.timed_on), clock.left)
            times[MACHINE] = Summary(*took)
        found.case(limit.case, times, limit.unit, limit.scale, missing=missing)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@cache
def rate(device: str, case: str, dry: bool = False) -> float:
    """Of the last limit whose case begins so, measured now: bytes or operations per second.

    Raises:
        RuntimeError: there is no figure, with its reason.
    """
    limit = [limit for limit in limits(device, dry) if limit.case.startswith(case)][-1]
    found = Results("limits")
    measure(found, [limit], 0.0 if dry else 0.5)
    (entry,) = found.entries
    if entry["value"] is None:
        raise RuntimeError(f"no floor without the limit {limit.case}: {entry['missing']}")
    return 1e9 * float(entry["value"])


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(30.0)
    given = parser.parse_args(words)
    if (device := parser.device(given)) == "cpu":
        torch.set_num_threads(1)
    found = Results("limits", given.save, device=device, row_bytes=ROW_BYTES)
    measure(found, list(limits(device, given.dry)), given.budget)
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
