"""Find faster launch configurations for the GPU that is here, and keep them in its table.

    python -m brc_fast.kernels.tools.tune [--ops NAME ...] [--seconds S] [--out FILE] [--dry]

For every kernel that a case names, the warps and block sizes of its configuration are halved and doubled, one
at a time, and again from the best of these while that gains; where CANDIDATES lists some for a kernel, those
are tried instead. A candidate must give the results of the present configuration to rounding. What wins by
more than 3%, on the geometric mean over the cases and batch sizes, without losing as much in any of them,
goes to tables/<architecture>.json (runtime/tables.py), into what is there already. Times are those of a
graph's replay (timing.py). Nothing of this happens when an op is used.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..runtime import tables
from ..runtime.dispatch import INTERPRETED, recording
from ..runtime.language import triton
from .cases import Case, cases
from .timing import batches_of, rotated, seconds_per_call

__all__ = ["disagreement", "main", "tensors", "tune"]

Config = dict[str, int]
Clock = Callable[[Sequence[Callable[[], object]], torch.device], float]

GAIN = 1.03
WARPS = {"cuda": 16, "hip": 8}
CANDIDATES: dict[str, Sequence[Config]] = {
    kernel: [
        {"BLOCK_P": block, "num_warps": warps, "PROGRAMS": programs}
        for block in (512, 1024, 2048, 4096)
        for warps in (4, 8)
        for programs in (8, 16, 32, 64)
    ]
    for kernel in ("adamw", "squares", "ema")
}
# The largest relative errors in norm between two ways to compute one thing in this dtype: of the whole and of
# the median row. Where a value decides (ReLU at 0), its rounding may turn a few gradients around.
SAME_KERNEL = {
    torch.float64: (1e-9, 1e-12),
    torch.float32: (2e-3, 5e-5),
    torch.float16: (1e-2, 1e-2),
    torch.bfloat16: (2e-2, 2e-2),
}
ROW = 0.75  # of any single row


def tensors(result: object) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries, in order."""
    if isinstance(result, Tensor):
        return [result]
    if isinstance(result, Mapping):
        result = list(result.values())
    return [x for part in result for x in tensors(part)] if isinstance(result, (tuple, list)) else []


def disagreement(
    mine: Sequence[Tensor],
    theirs: Sequence[Tensor],
    allowed: Mapping[torch.dtype, tuple[float, float]] = SAME_KERNEL,
) -> str | None:
    """What differs by more than rounding between two results, or None.

    Every tensor must agree as a whole and in most of its rows, and none of these may be something else. NaN
    agrees with nothing.
    """
    if len(mine) != len(theirs) or not mine:
        return f"{len(mine)} results, expected {len(theirs)}"
    for place, (a, b) in enumerate(zip(mine, theirs, strict=True)):
        if a.shape != b.shape or a.dtype != b.dtype:
            return f"result {place} is {a.dtype} {list(a.shape)}, expected {b.dtype} {list(b.shape)}"
        if a.numel() == 0:
            continue
        if not a.is_floating_point():
            if not torch.equal(a, b):
                return f"result {place} differs"
            continue
        limit, usual = allowed[a.dtype]
        wide = torch.float64 if a.dtype == torch.float64 else torch.float32
        rows = (-1, a.shape[-1]) if a.dim() > 1 else (-1, 1)
        exact = b.detach().to(wide).reshape(rows)
        errors, norms = (a.detach().to(wide).reshape(rows) - exact).norm(dim=1), exact.norm(dim=1)
        tiny = torch.finfo(wide).tiny
        whole = (errors.norm() / norms.norm().clamp_min(tiny)).item()
        of_rows = errors / norms.clamp_min(max(tiny, norms.square().mean().sqrt().item()))
        sample = of_rows[:: len(of_rows) // 2**20 + 1]  # CUDA's median takes its time
        median, worst = sample.median().item(), of_rows.max().item()
        if not (whole <= limit and median <= usual and worst <= ROW):
            return (
                f"result {place} is off by {whole:.1e} (allowed {limit:.0e}), "
                f"its rows by {median:.1e} in the median ({usual:.0e}) and by {worst:.1e} at most ({ROW})"
            )
    return None


def neighbours(config: Config, warps: int) -> Iterator[Config]:
    """`config` with its warps or one of its block sizes halved or doubled."""
    for name, value in config.items():
        if name == "num_warps" or name.startswith("BLOCK_"):
            for other in (value // 2, value * 2):
                if other >= 1 and (name != "num_warps" or other <= warps):
                    yield {**config, name: other}


class Subject(NamedTuple):
    """One entry of the table: what it is at present, and the cases that use it."""

    kernel: str
    entry: str
    config: Config
    work: list[tuple[Case, int]]  # with its batch size


def subjects(
    wanted: Iterable[Case], device: torch.device, batches: Sequence[int] | None = None
) -> list[Subject]:
    """What the cases ask `configuration` for; a kernel is tuned on the cases of the first op to name it."""
    found: dict[tuple[str, str], Subject] = {}
    for case in wanted:
        for batch in batches or batches_of(case):
            call = case.prepare(device, batch, "triton")
            with tables.observing() as asked, recording():  # nothing is compiled yet
                call()
            for (kernel, entry), config in asked.items():
                if kernel in case.kernels:
                    subject = found.setdefault((kernel, entry), Subject(kernel, entry, config, []))
                    if all(other.op == case.op for other, _ in subject.work):
                        subject.work.append((case, batch))
    return list(found.values())


class Refused(Exception):
    """A candidate cannot be used; the message says why."""


def ratios(
    subject: Subject, candidates: Sequence[Config], device: torch.device, clock: Clock, deadline: float
) -> list[list[float]]:
    """For each candidate, how many times as fast as the present configuration it is in each piece of work.

    A candidate that fails or gives other results is told of, and has none.
    """
    out: list[list[float]] = [[] for _ in candidates]
    refused: set[int] = set()
    if not candidates:
        return out
    for case, batch in subject.work:

        def results(case: Case = case, batch: int = batch) -> list[Tensor]:
            call = rotated(case, device, batch, "triton", sets=1)[0]
            return [x.detach().clone() for x in tensors(call())]

        expected = results()
        calls = rotated(case, device, batch, "triton")
        present = clock(calls, device)
        times: dict[int, float] = {}
        for place, candidate in enumerate(candidates):
            if place in refused:
                continue
            if time.perf_counter() > deadline:
                refused.add(place)
                continue
            try:
                with tables.trial(subject.kernel, candidate):
                    wrong = disagreement(results(), expected)
                    if wrong is not None:
                        raise Refused(f"other results: {wrong}")
                    times[place] = clock(calls, device)
            except Exception as error:  # whatever the compiler or the launcher raises
                if device.type == "cuda":
                    torch.cuda.synchronize()  # raises where the error has spoilt the device for good
                refused.add(place)
                reason = str(error) if isinstance(error, Refused) else f"{type(error).__name__}: {error}"
                print(f"  {subject.kernel} {candidate} skipped: {' '.join(reason.split())[:160]}", flush=True)
        if times:
            present = min(present, clock(calls, device))  # whatever else may have changed meanwhile
        for place, found in times.items():
            out[place].append(present / found)
    return [[] if place in refused else found for place, found in enumerate(out)]


def gain(found: Sequence[float]) -> float:
    """The geometric mean; 1 where a candidate has no times, or loses too much in some work."""
    if not found or min(found) < 1.0 / GAIN:
        return 1.0
    return math.prod(found) ** (1.0 / len(found))


def best(
    subject: Subject,
    listed: Sequence[Config] | None,
    device: torch.device,
    clock: Clock,
    deadline: float,
    limit: int | None = None,
) -> tuple[Config, float]:
    """The fastest configuration found, and how many times as fast as the present one it is."""
    warps = WARPS["hip" if torch.version.hip else "cuda"]
    winner, won = subject.config, 1.0
    tried = [subject.config]
    while True:
        around = neighbours(winner, warps) if listed is None else ({**subject.config, **c} for c in listed)
        candidates = [candidate for candidate in around if candidate not in tried][:limit]
        tried += candidates
        gains = [gain(found) for found in ratios(subject, candidates, device, clock, deadline)]
        if not gains or max(gains) <= max(won, GAIN):
            break
        won = max(gains)
        winner = candidates[gains.index(won)]
        if listed is not None or limit is not None:
            break
    if won > GAIN:  # the best of many is partly luck: time it once more
        won = gain(ratios(subject, [winner], device, clock, deadline)[0])
    return (winner, won) if won > GAIN else (subject.config, 1.0)


def machine(device: torch.device) -> dict[str, str]:
    """What the times of an entry belong to."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter",
        "torch": torch.__version__,
        "triton": triton.__version__,
    }


def store(path: Path, kernel: str, entry: str, config: Config, record: Mapping[str, Any]) -> None:
    """Put one entry into a table and leave the others as they are."""
    table = json.loads(path.read_text()) if path.exists() else {}
    table.setdefault("kernels", {}).setdefault(kernel, {})[entry] = config
    table.setdefault("measured", {}).setdefault(kernel, {})[entry] = dict(record)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


def tune(
    wanted: Iterable[Case],
    device: torch.device,
    *,
    seconds: float,
    batches: Sequence[int] | None = None,
    out: Path | None,
    listed: Mapping[str, Sequence[Config]] | None = None,
    clock: Clock | None = None,
    limit: int | None = None,
) -> int:
    """Tune what these cases use and store what wins in `out`; how many entries of a table it was.

    Args:
        seconds: after which nothing new is begun. batches: instead of `timing.batches_of`.
        listed: what to try instead of neighbours, by kernel. clock: seconds per call of some calls.
        limit: try this many candidates of the first kernel only.
    """
    clock = clock or (lambda calls, device: seconds_per_call(calls, device).median)
    deadline = time.perf_counter() + seconds
    wanted = list(wanted)
    todo = subjects(wanted, device, batches)[: None if limit is None else 1]
    if limit is None:
        for name in sorted({name for case in wanted for name in case.kernels} - {s.kernel for s in todo}):
            print(f"{name} is named by a case, but none of them asks for its configuration", flush=True)
    wins = 0
    for number, subject in enumerate(todo):
        if time.perf_counter() > deadline:
            print(f"time is up: {len(todo) - number} of {len(todo)} entries were not tried", flush=True)
            break
        own = (listed or {}).get(subject.kernel)
        config, won = best(subject, own, device, clock, deadline, limit)
        told = f"x {won:.2f} with {config}" if won > 1.0 else f"nothing is faster than {config}"
        print(f"{subject.kernel} [{subject.entry}]: {told}", flush=True)
        if won > 1.0:
            wins += 1
            labels = [f"{case.op} {case.label} B={batch}" for case, batch in subject.work]
            if out is not None:
                record = {"gain": round(won, 3), "over": subject.config, "cases": labels, **machine(device)}
                store(out, subject.kernel, subject.entry, config, record)
    return wins


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m brc_fast.kernels.tools.tune",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ops", nargs="+", help="only these ops")
    parser.add_argument("--seconds", type=float, default=480.0, help="time in all (default 480)")
    parser.add_argument("--out", type=Path, help="the table to write (default: that of this GPU)")
    parser.add_argument("--dry", action="store_true", help="one case, two candidates, in the interpreter")
    given = parser.parse_args(arguments)
    if given.dry and not INTERPRETED:
        print("--dry needs Triton's interpreter: set TRITON_INTERPRET=1 and install triton", file=sys.stderr)
        return 2
    if not given.dry and (INTERPRETED or not torch.cuda.is_available()):
        why = "TRITON_INTERPRET=1 is set" if INTERPRETED else "torch sees no CUDA device"
        print(f"tuning needs a GPU, and {why}; --dry tries the code in the interpreter", file=sys.stderr)
        return 2
    known = sorted({case.op for case in cases()})
    for name in given.ops or ():
        if name not in known:
            print(f"unknown op {name}; there are {', '.join(known)}", file=sys.stderr)
            return 2
    # float64 serves tests.
    wanted = (case for case in cases(given.ops) if case.kernels and "float64" not in case.label)
    if given.dry:
        # The interpreter computes with a bfloat16 as if it were an integer.
        case = min(wanted, key=lambda case: "float32" not in case.label)
        tune([case], torch.device("cpu"), seconds=given.seconds, batches=(2,), out=given.out, limit=2)
        return 0
    device = torch.device("cuda", torch.cuda.current_device())
    out = given.out or tables.TABLES / f"{tables.architecture(device)}.json"
    wins = tune(wanted, device, seconds=given.seconds, out=out, listed=CANDIDATES)
    print(f"{wins} entries of {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
