"""Time of every kernel op, forward and backward, beside the least it can take and beside what others take.

    python bench/bench_kernels.py [--budget SECONDS] [--ops NAME ...] [--workload NAME ...] [--json FILE]
        [--dry]

Providers: our kernels; the plain PyTorch twin; the twin through torch.compile; Liger's LayerNorm in place of
the twin. Results and gradients of each must first agree with those of the twin: where they do not stand a
reason and no time. What has results in 2 bytes, whose rounding hides small errors, must also agree in
float32, in the most similar case of its op (all but the compiled twin, whose source is the twin's). Times are
those of a CUDA graph's replay over rotated buffers (kernels/tools/timing.py). The floor of an op is the bytes
that it must move over the bandwidth of a copy, measured here and now; where the buffers fit in the L2 cache
together, an op may beat it, and its row says L2.
`--workload` takes the ops of an update at the sizes of these workloads (workload_cases.py), and no others.
`--dry` runs the same code at tiny sizes on the CPU, the kernels only under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import argparse
import inspect
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from bench_limits import KINDS, chain, copied, copies, multiplying
from harness import Measurement, absent, equality, interleave, measured, write
from torch import Tensor
from workload_cases import cases_of
from workloads import WORKLOADS, named

from brc_fast.kernels import reference
from brc_fast.kernels.runtime.dispatch import INTERPRETED
from brc_fast.kernels.tools.aot import cases as all_cases
from brc_fast.kernels.tools.cases import Case
from brc_fast.kernels.tools.timing import PARAMETERS, batches_of, cold, rotated, seconds_per_call
from brc_fast.kernels.tools.tune import disagreement, tensors

DRY_BATCHES, DRY_WIDTH = (4,), 16
MANY = 65_536  # rows for an op that moves little even at the largest batch size
LITTLE = 2**25  # bytes
# As kernels.tune.SAME_KERNEL, for the twin: in 2 bytes it rounds between operations, and a kernel does not.
# Sound kernels differ by up to 4e-3 then, by 6e-3 in the interpreter, which cuts where a GPU rounds, and
# single numbers by a unit in the last place, 2**-7.
TWIN = {
    torch.float64: (1e-9, 1e-10),
    torch.float32: (2e-3, 5e-5),
    torch.float16: (8e-3, 8e-3),
    torch.bfloat16: (8e-3, 8e-3),
}
# Layers pass on what was rounded, and ReLUs turn around: by up to 6e-2 in the interpreter.
DEEP = TWIN | dict.fromkeys((torch.float16, torch.bfloat16), (0.1, 0.05))
FEW = 256  # rows of a comparison in float32
OWN, PEERS = ("kernels", "eager"), ("compile", "liger")
PROVIDERS = OWN + PEERS
# The ops that Liger has something for, and why it does not do the same work.
LIGER: dict[str, str | None] = {"bias_layer_norm": None} | dict.fromkeys(
    ("categorical_cross_entropy", "two_hot_cross_entropy", "hl_gauss_cross_entropy"),
    "Liger's cross-entropy takes the index of a class, the target here is a distribution over the atoms",
)
LEAD = 2  # cases of every op that are measured before the others


class Target(NamedTuple):
    """What this project asks of an op on an H200 at the large batch."""

    share: float  # of the bandwidth of a copy
    over_compile: float | None = None  # times as fast as torch.compile
    bytes_per_parameter: float | None = None


TARGETS = {
    "bias_layer_norm": Target(0.80, over_compile=1.2),
    "categorical_bellman_loss": Target(0.80, over_compile=5.0),
    "categorical_bellman_loss_and_gradient": Target(0.80, over_compile=5.0),
    "categorical_cross_entropy": Target(0.80),
    "categorical_target": Target(0.80),
    "expected_value": Target(0.80),
    "pack_inputs": Target(0.80),
    "adamw_": Target(0.85, bytes_per_parameter=40),
}


def target_of(case: Case, moved: int) -> Target | None:
    """Targets hold where there is work for the whole GPU: from H = 512, and not in float64."""
    width = re.search(r"\bH=(\d+)", case.label)
    small = moved < 2**20 or (width is not None and int(width[1]) < 512)
    return None if small or "float64" in case.label else TARGETS.get(case.op)


class Unavailable(Exception):
    """A provider has no time here; the message says why."""


# ---------------------------------------------------------------- providers


@contextmanager
def instead(functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Put other functions in the place of the twins of these names."""
    before = {name: getattr(reference, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(reference, name, function)
        yield
    finally:
        for name, function in before.items():
            setattr(reference, name, function)


def twins_of(call: Callable[[], object]) -> list[str]:
    """The twins that a call enters, without those that they call themselves."""
    found: list[str] = []
    depth = 0

    def watched(name: str, twin: Callable[..., Any]) -> Callable[..., Any]:
        def function(*arguments: Any, **named: Any) -> Any:
            nonlocal depth
            if depth == 0 and name not in found:
                found.append(name)
            depth += 1
            try:
                return twin(*arguments, **named)
            finally:
                depth -= 1

        return function

    public = inspect.getmembers(reference, inspect.isfunction)
    with instead(
        {name: watched(name, twin) for name, twin in public if twin.__module__ == reference.__name__}
    ):
        call()
    if not found:
        raise Unavailable("the op does not call its twin through kernels.reference")
    return found


def compiled(call: Callable[[], object], backend: str) -> AbstractContextManager[None]:
    """The twins that this call enters, each through torch.compile, forward and backward."""
    import torch._inductor.config as inductor

    # Wrong LayerNorm gradients where it is on: pytorch issue 193061.
    if hasattr(inductor.triton, "mix_order_reduction"):
        inductor.triton.mix_order_reduction = False
    torch.compiler.reset()
    functions = {name: getattr(reference, name) for name in twins_of(call)}
    return instead(
        {
            name: torch.compile(function, fullgraph=True, dynamic=False, backend=backend)
            for name, function in functions.items()
        }
    )


def liger() -> AbstractContextManager[None]:
    """Liger's LayerNorm, once per network, with bias, ReLU and residual in PyTorch."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError as error:
        absent = (error.name or "").split(".")[0] == "liger_kernel"
        told = "is not installed" if absent else f"cannot be imported ({error})"
        raise Unavailable(f'liger_kernel {told}; pip install "brc-fast[bench]"') from None

    def bias_layer_norm(
        x: Tensor,
        bias: Tensor,
        weight: Tensor,
        shift: Tensor,
        *,
        residual: Tensor | None = None,
        relu: bool = False,
        eps: float = reference.EPS,
    ) -> Tensor:
        networks, width = math.prod(weight.shape[:-1]), weight.shape[-1]
        bias, weight, shift = (v.reshape(networks, width) for v in (bias, weight, shift))
        h = x.reshape(networks, -1, width) + bias.unsqueeze(1).to(x.dtype)
        parts = [LigerLayerNormFunction.apply(*part, eps) for part in zip(h, weight, shift, strict=True)]
        y = (torch.stack(parts) if networks > 1 else parts[0]).reshape(x.shape)
        y = y.relu() if relu else y
        return (y if residual is None else residual + y).to(x.dtype)

    return instead({"bias_layer_norm": bias_layer_norm})


def provider(
    name: str, case: Case, device: torch.device, batch: int, backend: str
) -> tuple[str, AbstractContextManager[None]]:
    """The `impl` to prepare a case with, and the block to do so in; Unavailable where it cannot run here."""
    if name == "kernels":
        if device.type != "cuda" and not INTERPRETED:
            raise Unavailable("not on this device")
        return "triton", nullcontext()
    if name == "compile":
        return "reference", compiled(rotated(case, device, batch, "reference", sets=1)[0], backend)
    if name == "liger":
        if (other := LIGER[case.op]) is not None:
            raise Unavailable(other)
        block = liger()
        if device.type != "cuda":
            raise Unavailable("not on this device")
        return "reference", block
    return "reference", nullcontext()


# ---------------------------------------------------------------- whether it is right


def results(call: Callable[[], object]) -> list[Tensor]:
    return [x.detach().clone() for x in tensors(call())]


def rounded(found: Sequence[Tensor]) -> bool:
    """Whether a result has 2 bytes."""
    return any(x.dtype in (torch.float16, torch.bfloat16) for x in found)


def allowed(name: str, op: str, expected: Sequence[Tensor]) -> Mapping[torch.dtype, tuple[float, float]]:
    """What results of each dtype may differ by.

    Of a provider or an op that rounds between operations, all of them by what the least precise one may.
    """
    if name == "kernels" and op != "bronet":
        return TWIN
    limits = DEEP if op == "bronet" else TWIN
    kinds = {x.dtype for x in expected if x.is_floating_point()}
    return dict.fromkeys(kinds, max((limits[kind] for kind in kinds), default=(0.0, 0.0)))


@contextmanager
def agreeing(
    case: Case, device: torch.device, batch: int, name: str, backend: str, sets: int | None = None
) -> Iterator[list[Callable[[], object]]]:
    """The calls of a provider, to be made in the block; Unavailable where they cannot be or are wrong."""
    impl, block = provider(name, case, device, batch, backend)
    expected = None
    if name != "eager":
        expected = results(rotated(case, device, batch, "reference", sets=1)[0])
        if name != "compile" and rounded(expected):
            other = in_float32(case, device)
            wrong = other and wrong_in_float32(other, device, min(batch, FEW), name, backend)
            if other is not None and wrong is not None:
                raise Unavailable(f"in float32 ({other.label}) {wrong}")
    with block:
        calls = rotated(case, device, batch, impl, sets)
        found = results(calls[0])
        if expected is not None:
            wrong = disagreement(found, expected, allowed(name, case.op, expected))
            if wrong is not None:
                raise Unavailable(f"differs from the twin: {wrong}")
        del found, expected
        yield calls


@cache
def precise(op: str, device: torch.device) -> tuple[Case, ...]:
    """The cases of an op without results in 2 bytes."""
    known = (case for case in all_cases([op]) if "float64" not in case.label)
    return tuple(case for case in known if not rounded(results(rotated(case, device, 2, "reference", 1)[0])))


def in_float32(case: Case, device: torch.device) -> Case | None:
    """The case of the same op that is most like this one and has no results in 2 bytes, or None."""
    words = set(re.sub(r"\bb?float16\b", "float32", case.label).split())
    return min(
        precise(case.op, device), key=lambda other: len(words ^ set(other.label.split())), default=None
    )


@cache
def wrong_in_float32(case: Case, device: torch.device, batch: int, name: str, backend: str) -> str | None:
    """Why a provider is wrong in a case of `precise`, which many others share; None where it is right."""
    try:
        with agreeing(case, device, batch, name, backend, sets=1):
            return None
    except Unavailable as reason:
        return str(reason)


def measure(
    case: Case, device: torch.device, batch: int, name: str, *, seconds: float, backend: str
) -> dict[str, Any]:
    """The time of a provider, or the reason why there is none: {"seconds", ..} or {"missing"}.

    RuntimeError where an error has spoilt the device for good.
    """
    try:
        with agreeing(case, device, batch, name, backend) as calls:
            timing = seconds_per_call(calls, device, seconds)
            single = launched(calls, device, seconds / 5)
    except Unavailable as reason:
        return {"missing": str(reason)}
    except Exception as error:  # of one provider: the others go on
        if device.type == "cuda":
            torch.cuda.synchronize()
        return {"missing": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    return {
        "seconds": timing.median,
        "quartiles": [timing.low, timing.high],
        "samples": timing.samples,
        "seconds_outside_of_a_graph": single,
    }


def launched(calls: Sequence[Callable[[], object]], device: torch.device, seconds: float) -> float:
    """Seconds per call, made from Python one after the other."""
    times = interleave({"": lambda: [call() for call in calls]}, seconds=seconds, calls=1, device=device.type)
    return statistics.median(times[""]) / len(calls)


# ---------------------------------------------------------------- the machine


def machine(device: torch.device, seconds: float, dry: bool) -> dict[str, float]:
    """Bandwidth of a copy, read plus written; the time of one more dependent tiny kernel in a graph."""
    copy = seconds_per_call(copies(device, dry), device, seconds)
    tiny = chain(device, 2 if dry else 100, seconds)
    moved = 2 * 4 * copied(device, dry)
    return {"copy_bytes_per_second": moved / copy.median, "seconds_per_tiny_kernel": tiny.median}


def products(device: torch.device, seconds: float, dry: bool, deadline: float) -> list[dict[str, Any]]:
    """TFLOP/s of the critic's batched products: the input layer, plain and padded, and the square layers."""
    rows = []
    members, batch = (2, 8) if dry else (2, 1024)
    for width in (16,) if dry else (512, 1024, 4096):
        for inputs in (123, 128, width):
            for kind in KINDS:
                if time.perf_counter() > deadline:
                    return rows
                with multiplying(kind) as dtype:
                    calls = []
                    for _ in range(2 if dry else 8):
                        x = torch.randn(members, batch, inputs, device=device).to(dtype)
                        w = torch.randn(members, inputs, width, device=device).to(dtype)
                        out = torch.empty(members, batch, width, device=device, dtype=dtype)
                        calls.append(lambda x=x, w=w, out=out: torch.bmm(x, w, out=out))
                    timing = seconds_per_call(calls, device, seconds)
                work = 2.0 * members * batch * inputs * width
                rate = work / timing.median / 1e12
                shape = {"E": members, "B": batch, "K": inputs, "H": width, "kind": kind}
                rows.append({**shape, "seconds": timing.median, "tflops": rate})
                print(
                    f"  bmm E={members} B={batch} K={inputs:<5} H={width:<5} {kind:<9}"
                    f"{timing.median * 1e6:9.1f} us {rate:7.1f} TFLOP/s",
                    flush=True,
                )
    return rows


# ---------------------------------------------------------------- rows


class Row:
    """A case at a batch size, and what was found for it."""

    def __init__(
        self, case: Case, batch: int, device: torch.device, bandwidth: float, rank: int, *, large: bool
    ) -> None:
        self.case, self.batch, self.rank = case, batch, rank
        self.bytes = case.bytes(batch)
        self.floor = self.bytes / bandwidth
        self.cold = cold(self.bytes, device)
        self.target = target_of(case, self.bytes) if large else None
        self.providers: dict[str, dict[str, Any]] = {}

    def seconds(self, name: str) -> float | None:
        return self.providers.get(name, {}).get("seconds")

    def speedup(self, name: str) -> float | None:
        """How many times as fast as this provider the kernels are."""
        ours, theirs = self.seconds("kernels"), self.seconds(name)
        return None if ours is None or theirs is None else theirs / ours

    def stored(self) -> dict[str, Any]:
        shares = {name: self.floor / took for name in PROVIDERS if (took := self.seconds(name)) is not None}
        speedups = {name: ratio for name in PROVIDERS[1:] if (ratio := self.speedup(name)) is not None}
        return {
            "op": self.case.op,
            "case": self.case.label,
            "batch": self.batch,
            "bytes": self.bytes,
            "floor_seconds": self.floor,
            "larger_than_cache": self.cold,
            "providers": self.providers,
            "share_of_copy": shares,
            "kernels_speedup_over": speedups,
            "target": None if self.target is None else self.target._asdict(),
        }

    def measurements(self) -> Iterator[Measurement]:
        """Microseconds of every provider; a wrong one has its reason instead."""
        case, floor = f"{self.case.op} {self.case.label} B={self.batch}", self.floor * 1e6
        for name, told in self.providers.items():
            if "missing" in told:
                yield absent(case, name, told["missing"], "us", "less", floor)
                continue
            low, high = (1e6 * value for value in told["quartiles"])
            found = measured(case, name, [1e6 * told["seconds"]], "us", "less", floor)
            yield {**found, "low": low, "high": high, "rounds": told["samples"]}

    def __str__(self) -> str:
        """A line of the table, and one for each provider without a time."""
        words = [f"{f'{self.case.op} {self.case.label}':<72} {self.batch:>6}{self.floor * 1e6:>10.1f}"]
        reasons = []
        for name in PROVIDERS:
            took = self.seconds(name)
            words.append(f"{'-':>17}" if took is None else f"{took * 1e6:10.1f} ({self.floor / took:4.0%})")
            if "missing" in self.providers.get(name, {}):
                reasons.append(f"    {name}: {self.providers[name]['missing']}")
        ratio = self.speedup("compile")
        words.append(f"{'-':>8}" if ratio is None else f"{ratio:8.2f}")
        words.append("  " if self.cold else "L2")
        if self.target is not None:
            words.append(f">= {self.target.share:.0%}")
            if self.target.over_compile is not None:
                words.append(f"and {self.target.over_compile:g} x")
            if self.target.bytes_per_parameter is not None:
                each = self.bytes / (PARAMETERS * self.batch)
                words.append(f"and {each:.0f} <= {self.target.bytes_per_parameter:.0f} B per parameter")
        return "\n".join([" ".join(words).rstrip(), *reasons])


HEAD = " ".join(
    [f"{'op and case':<72} {'batch':>6}{'floor us':>10}"]
    + [f"{name + ' us (share)':>17}" for name in PROVIDERS]
    + ["/compile", "  ", "target"]
)


def spread(cases: Sequence[Case]) -> list[tuple[int, Case]]:
    """Every op in turn, and of each op cases from all over its list first; with the place within the op."""

    def reversed_bits(place: int) -> int:
        return int(f"{place:032b}"[::-1], 2)

    per_op: dict[str, list[Case]] = {}
    for case in cases:
        per_op.setdefault(case.op, []).append(case)
    ranked = []
    for own in per_op.values():
        order = sorted(range(len(own)), key=reversed_bits)
        ranked += [(rank, own[place]) for rank, place in enumerate(order)]
    return sorted(ranked, key=lambda pair: pair[0])


def run(
    device: torch.device,
    seconds: float,
    *,
    dry: bool = False,
    ops: Sequence[str] | None = None,
    cases: Sequence[Case] | None = None,
    batches: Callable[[Case], Sequence[int]] = batches_of,
    keep: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """Everything above, what matters most first, until the time is up.

    Targets, and many rows of what moves little, belong to the usual `batches`. What was not reached is
    counted. Where an error spoils the device, "aborted" says so beside what there is. `keep` is called with
    what there is after each pass over the cases.
    """
    for known in (precise, wrong_in_float32):
        known.cache_clear()
    deadline = time.perf_counter() + seconds
    each = 0.0 if dry else 0.05
    backend = "aot_eager" if dry else "inductor"
    given = all_cases(ops) if cases is None else cases
    wanted = spread([case for case in given if "float64" not in case.label])  # that one serves tests
    speed = machine(device, each, dry)
    bandwidth = speed["copy_bytes_per_second"]
    print(
        f"  copy {bandwidth / 1e12:.2f} TB/s read and written, "
        f"one more tiny kernel in a graph {speed['seconds_per_tiny_kernel'] * 1e6:.2f} us",
        flush=True,
    )
    matrices = products(device, each, dry, time.perf_counter() + seconds / 6)
    usual = batches is batches_of
    real: list[Row] = []
    many: list[Row] = []
    small: list[Row] = []
    for rank, case in wanted:
        batch, *smaller = DRY_BATCHES if dry else batches(case)
        real.append(Row(case, batch, device, bandwidth, rank, large=usual))
        if usual and not dry and 2**10 < case.bytes(batch) < LITTLE:
            many.append(Row(case, MANY, device, bandwidth, rank, large=True))
        small += [Row(case, size, device, bandwidth, rank, large=False) for size in smaller]
    lead = [row for row in real if row.rank < LEAD]
    rest = [row for row in real if row.rank >= LEAD]
    aimed = [row for row in lead if row.target is not None and row.target.over_compile is not None]
    others = [row for row in real if row not in aimed]
    passes = [
        (lead, OWN),
        (aimed, PEERS),
        (rest, OWN),
        (many, OWN),
        (others, PEERS),
        (small, OWN),
    ]
    missed, aborted = 0, None

    def found() -> dict[str, Any]:
        done = [row for part in (real, many, small) for row in part if row.providers]
        return {
            "machine": speed,
            "products": matrices,
            "rows": [row.stored() for row in done],
            "measurements": [entry for row in done for entry in row.measurements()],
            "equality": equality([]),  # a provider that differs has a reason in the place of its time
            "not_reached": missed,
            "aborted": aborted,
        }

    for part, names in passes:
        if not part:
            continue
        print(HEAD, flush=True)
        for row in part:
            for name in names:
                if name == "liger" and row.case.op not in LIGER:
                    continue
                if dry and name != "eager" and row.rank > 0:
                    continue  # the interpreter and the compiler take seconds each
                if aborted is not None or time.perf_counter() > deadline:
                    missed += 1
                    continue
                try:
                    row.providers[name] = measure(
                        row.case, device, row.batch, name, seconds=each, backend=backend
                    )
                except RuntimeError as error:
                    aborted = f"{row.case.op} {row.case.label}, {name}: {error}"
                    print(f"  aborted: {aborted}", flush=True)
            if any(name in row.providers for name in names):
                print(row, flush=True)
        keep(found())
    if missed:
        print(f"  {missed} measurements were not made: time was up", flush=True)
    return found()


def workload_sizes(names: Sequence[str], dry: bool) -> dict[Case, int]:
    """The cases of these workloads with their batch sizes; critics are narrow in a dry run."""
    found = [named(name) for name in names]
    narrow = [workload._replace(width=DRY_WIDTH) for workload in found] if dry else found
    return {case: workload.batch for workload in narrow for case in cases_of(workload)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--budget", type=float, default=600.0, help="seconds in all (default 600)")
    parser.add_argument("--ops", nargs="+", help="only these ops")
    parser.add_argument("--workload", nargs="+", metavar="NAME", help=f"among {', '.join(WORKLOADS)}")
    parser.add_argument("--json", type=Path, help="write the rows here")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    given = parser.parse_args(arguments)
    if not given.dry and not torch.cuda.is_available():
        print("bench_kernels: torch sees no CUDA device; --dry runs on the CPU", file=sys.stderr)
        return 2
    try:
        sizes = workload_sizes(given.workload or (), given.dry)
    except ValueError as error:
        print(f"bench_kernels: {error}", file=sys.stderr)
        return 2
    known = sorted({case.op for case in sizes or all_cases()})
    for name in given.ops or ():
        if name not in known:
            print(f"bench_kernels: unknown op {name}; there are {', '.join(known)}", file=sys.stderr)
            return 2
    device = torch.device("cpu" if given.dry else "cuda")
    if sizes:
        cases = [case for case in sizes if not given.ops or case.op in given.ops]
        found = run(device, given.budget, dry=given.dry, cases=cases, batches=lambda case: [sizes[case]])
    else:
        found = run(device, given.budget, dry=given.dry, ops=given.ops)
    if given.json is not None:
        write(given.json.stem, {"benchmark": "kernels", "dry": given.dry, **found}, given.json.parent)
    return 0 if found["aborted"] is None else 1


if __name__ == "__main__":
    sys.exit(main())
