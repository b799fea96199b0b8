"""Time of every kernel op, forward and backward, beside the least it can take and beside what others take.

    python bench/bench_kernels.py [--budget SECONDS] [--ops NAME ...] [--save NAME] [--dry]

Providers: our kernels; the plain PyTorch twin; the twin through torch.compile. Results and gradients of each
must first agree with those of the twin: where they do not stand a reason and no time. Times are
those of a CUDA graph's replay over rotated buffers (kernels/tools/timing.py). The floor of an op is the bytes
that it must move over the bandwidth of a copy, measured here and now; where the buffers fit in the L2 cache
together, an op may beat it, and its case says L2.
`--dry` runs the same code at tiny sizes on the CPU, the kernels only under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping, Sequence

import torch
from bench_limits import rate
from harness import TIME_UP, Clock, Differs, Missing, Parser, Results, Summary, Unavailable
from torch import Tensor

from brc_fast.kernels.runtime.dispatch import INTERPRETED
from brc_fast.kernels.tools.aot import cases as all_cases
from brc_fast.kernels.tools.cases import Case
from brc_fast.kernels.tools.timing import batches_of, cold, rotated, seconds_per_call
from brc_fast.kernels.tools.tune import disagreement, tensors

DRY_BATCH, EACH = 4, 0.05
# As kernels.tools.tune.SAME_KERNEL, for the twin: in 2 bytes it rounds between operations, and a kernel does
# not. Sound kernels differ by up to 4e-3 then, by 6e-3 in the interpreter, which cuts where a GPU rounds.
LOW = torch.bfloat16
TWIN = {torch.float64: (1e-9, 1e-10), torch.float32: (2e-3, 5e-5)}
TWIN |= dict.fromkeys((torch.float16, LOW), (8e-3, 8e-3))
# Layers pass on what was rounded, and ReLUs turn around: by up to 6e-2 in the interpreter.
DEEP = TWIN | dict.fromkeys((torch.float16, LOW), (0.1, 0.05))


IMPLS = {"kernels": "triton", "eager": "reference", "compile": "compile"}  # by provider
Call = Callable[[], object]


# ---------------------------------------------------------------- whether it is right


def results(call: Call) -> list[Tensor]:
    return [x.detach().clone() for x in tensors(call())]


def allowed(name: str, op: str, expected: Sequence[Tensor]) -> Mapping[torch.dtype, tuple[float, float]]:
    """What results of each dtype may differ by: of a provider or an op that rounds between operations, all of
    them by what the least precise one may."""
    if name == "kernels" and op != "bronet":
        return TWIN
    limits = DEEP if op == "bronet" else TWIN
    kinds = {x.dtype for x in expected if x.is_floating_point()}
    return dict.fromkeys(kinds, max((limits[kind] for kind in kinds), default=(0.0, 0.0)))


def agreeing(case: Case, device: torch.device, batch: int, name: str) -> list[Call]:
    """The calls of a provider.

    Raises:
        Differs: they are wrong. Unavailable: they cannot be made.
    """
    if name == "kernels" and device.type != "cuda" and not INTERPRETED:
        raise Unavailable("not on this device")
    right = results(rotated(case, device, batch, "reference", sets=1)[0]) if name != "eager" else []
    calls = rotated(case, device, batch, IMPLS[name])
    if right and (wrong := disagreement(results(calls[0]), right, allowed(name, case.op, right))):
        raise Differs(f"differs from the twin: {wrong}")
    return calls


# ---------------------------------------------------------------- all of them


def measure(
    found: Results, case: Case, device: torch.device, batch: int, names: Sequence[str], each: float
) -> None:
    """One case; RuntimeError where an error has spoilt the device for good."""
    times, missing = dict[str, Summary](), Missing()
    for name in names:
        with missing.of(name):
            calls = agreeing(case, device, batch, name)
            times[name] = Summary(*seconds_per_call(calls, device, each))
            del calls  # with its memory
        if name in missing and device.type == "cuda":
            torch.cuda.synchronize()
    floor = dict.fromkeys(names, case.bytes(batch) / found.found["bandwidth"])
    label = f"{case.op} {case.label} B={batch}" + ("" if cold(case.bytes(batch), device) else " L2")
    found.case(label, times, "us", ours="kernels", missing=missing, floor=floor)


def run(
    found: Results, cases: Mapping[Case, Sequence[int]], device: torch.device, seconds: float, dry: bool
) -> int:
    """Every case at its batch sizes, in an order without a pattern, until the time is up; the exit code."""
    clock, found.found["bandwidth"] = Clock(seconds), rate(device.type, "copy", dry)
    kept = [case for case in cases if "float64" not in case.label]  # that one serves tests
    rows = [(case, batch) for case in kept for batch in ((DRY_BATCH,) if dry else cases[case])]
    random.Random(0).shuffle(rows)
    seen = set[str]()
    for place, (case, batch) in enumerate(rows):
        names = list(IMPLS)
        if dry:  # the interpreter and the compiler take seconds each
            names = ["kernels", "eager"] if case.op not in seen else ["eager"]
        seen.add(case.op)
        if clock.left == 0.0:
            found.found["not_reached"] = [f"{case.op} {case.label} B={batch}" for case, batch in rows[place:]]
            print(f"{len(rows) - place} cases were not reached: {TIME_UP}")
            break
        try:
            measure(found, case, device, batch, names, 0.0 if dry else EACH)
        except RuntimeError as error:
            found.found |= {"status": "failed", "reason": f"{case.op} {case.label}: {error}"}
            print(f"aborted: {found.found['reason']}", file=sys.stderr)
            return found.end() or 1
    return found.end()


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(600.0)
    parser.add_argument(
        "--ops", nargs="+", choices=sorted({case.op for case in all_cases()}), help="only these"
    )
    given = parser.parse_args(words)
    if not given.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry runs on the CPU")
    cases = {case: batches_of(case) for case in all_cases() if case.op in (given.ops or [case.op])}
    found = Results("kernels", given.save, judged="kernels", dry=given.dry)
    return run(found, cases, torch.device("cpu" if given.dry else "cuda"), given.budget, given.dry)


if __name__ == "__main__":
    sys.exit(main())
