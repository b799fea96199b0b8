"""Time of every kernel op, forward and backward, beside the least it can take and beside what others take.

    python bench/bench_kernels.py [--budget SECONDS] [--ops NAME ...] [--workload NAME ...] [--json FILE]
        [--dry]

Providers: our kernels; the plain PyTorch twin; the twin through torch.compile; Liger's LayerNorm in place of
the twin. Results and gradients of each must first agree with those of the twin: where they do not stand a
reason and no time. What has results in 2 bytes, whose rounding hides small errors, must also agree in
float32, in the most similar case of its op (all but the compiled twin, whose source is the twin's). Times are
those of a CUDA graph's replay over rotated buffers (kernels/tools/timing.py). The floor of an op is the bytes
that it must move over the bandwidth of a copy, measured here and now; where the buffers fit in the L2 cache
together, an op may beat it, and its case says L2.
`--workload` takes the ops of an update at the sizes of these workloads, and no others.
`--dry` runs the same code at tiny sizes on the CPU, the kernels only under TRITON_INTERPRET=1.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from bench_limits import machine
from harness import TIME_UP, Clock, Differs, Parser, Results, Unavailable
from roofline import Net
from torch import Tensor
from workloads import WORKLOADS, Workload, named

from brc_fast import kernels
from brc_fast.kernels import reference
from brc_fast.kernels.runtime.dispatch import INTERPRETED
from brc_fast.kernels.tools.aot import cases as all_cases
from brc_fast.kernels.tools.cases import Case
from brc_fast.kernels.tools.timing import Timing, batches_of, cold, rotated, seconds_per_call
from brc_fast.kernels.tools.tune import disagreement, tensors
from peers.updates import Subject

DRY_BATCH, DRY_WIDTH, EACH = 4, 16, 0.05
# As kernels.tools.tune.SAME_KERNEL, for the twin: in 2 bytes it rounds between operations, and a kernel does
# not. Sound kernels differ by up to 4e-3 then, by 6e-3 in the interpreter, which cuts where a GPU rounds, and
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
PROVIDERS = ("kernels", "eager", "compile", "liger")
# The ops that Liger has something for, and why it does not do the same work.
LIGER: dict[str, str | None] = {"bias_layer_norm": None} | dict.fromkeys(
    ("categorical_cross_entropy", "two_hot_cross_entropy", "hl_gauss_cross_entropy"),
    "Liger's cross-entropy takes the index of a class, the target here is a distribution over the atoms",
)
LOW = torch.bfloat16

Call = Callable[[], object]


# ---------------------------------------------------------------- providers


@contextmanager
def liger() -> Iterator[None]:
    """Liger's LayerNorm in the place of the twin: once per network, with bias, ReLU and residual in PyTorch."""
    try:
        from liger_kernel.ops.layer_norm import LigerLayerNormFunction
    except ImportError as error:
        absent = (error.name or "").split(".")[0] == "liger_kernel"
        told = "is not installed" if absent else f"cannot be imported ({error})"
        raise Unavailable(f'liger_kernel {told}; pip install "brc-fast[bench]"') from None

    def bias_layer_norm(
        x: Tensor, bias: Tensor, weight: Tensor, shift: Tensor, *, residual: Tensor | None = None,
        relu: bool = False, eps: float = reference.EPS,
    ) -> Tensor:  # fmt: skip
        networks, width = math.prod(weight.shape[:-1]), weight.shape[-1]
        bias, weight, shift = (v.reshape(networks, width) for v in (bias, weight, shift))
        h = x.reshape(networks, -1, width) + bias.unsqueeze(1).to(x.dtype)
        parts = [LigerLayerNormFunction.apply(*part, eps) for part in zip(h, weight, shift, strict=True)]
        y = (torch.stack(parts) if networks > 1 else parts[0]).reshape(x.shape)
        y = y.relu() if relu else y
        return (y if residual is None else residual + y).to(x.dtype)

    before, reference.bias_layer_norm = reference.bias_layer_norm, bias_layer_norm
    try:
        yield
    finally:
        reference.bias_layer_norm = before


def provider(name: str, op: str, device: torch.device) -> tuple[str, AbstractContextManager[None]]:
    """The `impl` to prepare a case with, and the block to do so in; Unavailable where it cannot run here."""
    there = device.type == "cuda" or (name == "kernels" and INTERPRETED)
    if name == "liger" and (reason := LIGER[op]) is not None:
        raise Unavailable(reason)
    if name in ("kernels", "liger") and not there:
        if name == "liger":
            liger().__enter__()  # tells what is not installed
        raise Unavailable("not on this device")
    impl = {"kernels": "triton", "compile": "compile"}.get(name, "reference")
    return impl, liger() if name == "liger" else nullcontext()


# ---------------------------------------------------------------- whether it is right


def results(call: Call) -> list[Tensor]:
    return [x.detach().clone() for x in tensors(call())]


def rounded(found: Sequence[Tensor]) -> bool:
    """Whether a result has 2 bytes."""
    return any(x.dtype in (torch.float16, torch.bfloat16) for x in found)


def allowed(name: str, op: str, expected: Sequence[Tensor]) -> Mapping[torch.dtype, tuple[float, float]]:
    """What results of each dtype may differ by: of a provider or an op that rounds between operations, all of
    them by what the least precise one may."""
    if name == "kernels" and op != "bronet":
        return TWIN
    limits = DEEP if op == "bronet" else TWIN
    kinds = {x.dtype for x in expected if x.is_floating_point()}
    return dict.fromkeys(kinds, max((limits[kind] for kind in kinds), default=(0.0, 0.0)))


@contextmanager
def agreeing(
    case: Case, device: torch.device, batch: int, name: str, sets: int | None = None
) -> Iterator[list[Call]]:
    """The calls of a provider, to be made in the block.

    Raises:
        Differs: they are wrong. Unavailable: they cannot be made.
    """
    impl, block = provider(name, case.op, device)
    wrong, right = None, list[Tensor]()
    if name != "eager":
        right = results(rotated(case, device, batch, "reference", sets=1)[0])
        if name != "compile" and rounded(right) and (other := in_float32(case, device)) is not None:
            if wrong := wrong_in_float32(other, device, min(batch, FEW), name):
                raise Differs(f"in float32 ({other.label}) {wrong}")
    with block:
        calls = rotated(case, device, batch, impl, sets)
        if right and (wrong := disagreement(results(calls[0]), right, allowed(name, case.op, right))):
            raise Differs(f"differs from the twin: {wrong}")
        del right
        yield calls


@cache
def precise(op: str, device: torch.device) -> tuple[Case, ...]:
    """The cases of an op without results in 2 bytes."""
    known = (case for case in all_cases([op]) if "float64" not in case.label)
    return tuple(case for case in known if not rounded(results(rotated(case, device, 2, "reference", 1)[0])))


def in_float32(case: Case, device: torch.device) -> Case | None:
    """The case of the same op that is most like this one and has no results in 2 bytes, or None."""
    words = set(re.sub(r"\bb?float16\b", "float32", case.label).split())
    return min(precise(case.op, device), key=lambda other: len(words ^ {*other.label.split()}), default=None)


@cache
def wrong_in_float32(case: Case, device: torch.device, batch: int, name: str) -> str | None:
    """Why a provider is wrong in a case of `precise`, which many others share; None where it is right."""
    try:
        with agreeing(case, device, batch, name, sets=1):
            return None
    except Unavailable as reason:
        return str(reason)


# ---------------------------------------------------------------- cases


def spread(cases: Sequence[Case]) -> list[Case]:
    """Every op in turn, and of each op cases from all over its list first."""

    def rank(place: int) -> int:
        return int(f"{place:032b}"[::-1], 2)

    per_op: dict[str, list[Case]] = {}
    for case in cases:
        per_op.setdefault(case.op, []).append(case)
    ranked = [
        (order, own[place])
        for own in per_op.values()
        for order, place in enumerate(sorted(range(len(own)), key=rank))
    ]
    return [case for _, case in sorted(ranked, key=lambda pair: pair[0])]


def of_update(workload: Workload) -> Iterator[Case]:
    """The ops of an update at the sizes of a workload, products in bfloat16; to be run at its batch size."""
    sizes = Subject(workload).sizes
    (actor, critic), members, atoms = sizes.nets, sizes.critic.members, sizes.critic.num_atoms

    def case(
        op: str, label: str, prepare: Callable[[torch.device, int, str], Call], row: int, fixed: int = 0
    ) -> Case:
        return Case(op, f"{workload.name}: {label}", prepare, lambda batch: row * batch + fixed)

    def pack(device: torch.device, batch: int, impl: str) -> Call:
        seen = torch.randn(batch, sizes.observation, device=device)
        actions, table, ids = torch.randn(batch, sizes.action, device=device), None, None
        if sizes.embedding:
            table = torch.randn(sizes.tasks, sizes.embedding, device=device)
            ids = torch.randint(sizes.tasks, (batch,), device=device)
        width = critic.inputs
        return lambda: kernels.pack_inputs(seen, actions, table, ids, "l2", width=width, dtype=LOW, impl=impl)

    def value(device: torch.device, batch: int, impl: str) -> Call:
        logits = torch.randn(members, batch, critic.outputs, device=device).to(LOW)[..., :atoms]
        support = torch.linspace(-10.0, 10.0, atoms, device=device)
        return lambda: kernels.expected_value_and_gradient(logits, support, impl=impl)

    def norm(device: torch.device, batch: int, impl: str) -> Call:
        x, seed = torch.randn(2, members, batch, critic.width, device=device).to(LOW)
        leaves = [x.requires_grad_(), *torch.randn(3, members, critic.width, device=device).unbind()]
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]

        def call() -> object:
            out = kernels.bias_layer_norm(*leaves, relu=True, impl=impl)
            return out, *torch.autograd.grad(out, leaves, seed)

        return call

    def adamw(device: torch.device, batch: int, impl: str) -> Call:
        number = sizes.parameters
        parameter, target, first, second = torch.randn(4, number, device=device).abs()
        low, target_low = torch.empty(2, number, device=device, dtype=LOW)
        state = [parameter, parameter.to(LOW), first, second, torch.zeros((), device=device)]
        options: dict[str, Any] = {"target": target, "low": low, "target_low": target_low, "impl": impl}
        rule: dict[str, Any] = {
            "learning_rate": 3e-4,
            "betas": (0.9, 0.999),
            "eps": 1e-8,
            "weight_decay": 1e-4,
        }

        def call() -> object:
            kernels.adamw_(*state, **rule, **options)
            return [*state, target, low, target_low]

        return call

    size = LOW.itemsize
    inputs = f"O={sizes.observation} A={sizes.action} D={sizes.embedding} T={sizes.tasks}"
    packed = 4 * (sizes.observation + sizes.action) + size * critic.inputs + (8 if sizes.embedding else 0)
    yield case("pack_inputs", f"{inputs} W={critic.inputs}", pack, packed)
    hidden = members * critic.width * size
    yield case("bias_layer_norm", f"E={members} H={critic.width} bfloat16 relu", norm, 5 * hidden)
    yield case(
        "expected_value_and_gradient",
        f"E={members} K={atoms}",
        value,
        2 * members * atoms * size + 4 * members,
    )
    yield bodies(workload, actor, 1)
    yield bodies(workload, critic, members)
    moved = sizes.parameters * (8 * 4 + 3 * size)
    yield case("adamw_", f"P={sizes.parameters} target, copies", adamw, 0, moved)


def bodies(workload: Workload, net: Net, networks: int) -> Case:
    """Networks forward and backward: kernels twice and their gradients; inputs, activations and gradients."""
    inputs = [net.inputs] + [net.width] * (net.layers - 1)

    def prepare(device: torch.device, batch: int, impl: str) -> Call:
        leaves = list[Tensor]()
        for size in inputs:
            kernel = torch.randn(networks, size, net.width, device=device) / size**0.5
            leaves += [kernel.to(LOW), *torch.rand(3, networks, net.width, device=device)]
        head = torch.randn(networks, net.width, net.outputs, device=device) / net.width**0.5
        leaves += [head.to(LOW), torch.zeros(networks, net.outputs, device=device)]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        x = torch.randn(batch, net.inputs, device=device).to(LOW)
        seed = torch.randn(networks, batch, net.outputs, device=device).to(LOW)

        def call() -> object:
            out = kernels.bronet(x, *leaves, impl=impl)
            return out, *torch.autograd.grad(out, leaves, seed)

        return call

    per_row = net.inputs + 6 * net.width * net.layers + 2 * net.outputs
    label = f"{workload.name}: N={networks} I={net.inputs} H={net.width} depth={net.depth} K={net.outputs}"
    held = networks * LOW.itemsize
    return Case("bronet", label, prepare, lambda batch: held * (3 * net.parameters + per_row * batch))


# ---------------------------------------------------------------- all of them


def measure(
    found: Results, case: Case, device: torch.device, batch: int, names: Sequence[str], each: float
) -> None:
    """One case; RuntimeError where an error has spoilt the device for good."""
    times, missing = dict[str, Timing](), dict[str, BaseException]()
    for name in names:
        try:
            with agreeing(case, device, batch, name) as calls:
                times[name] = seconds_per_call(calls, device, each)
        except Exception as error:  # of one provider: the others go on
            if device.type == "cuda":
                torch.cuda.synchronize()
            # Of a peer it costs no more than its own time.
            missing[name] = (
                error if name == "kernels" or not isinstance(error, Differs) else Unavailable(str(error))
            )
    seconds = case.bytes(batch) / found.found["limits"]["bandwidth"]
    place = f"{case.op} {case.label} B={batch}" + ("" if cold(case.bytes(batch), device) else " L2")
    found.case(place, times, "us", ours="kernels", missing=missing, floor=dict.fromkeys(names, seconds))


def run(
    found: Results, cases: Mapping[Case, Sequence[int]], device: torch.device, seconds: float, dry: bool
) -> int:
    """Every case at its first batch size, then at the others, until the time is up; the exit code."""
    precise.cache_clear()
    wrong_in_float32.cache_clear()
    clock, found.found["limits"] = Clock(seconds), machine(device.type, dry=dry)._asdict()
    order = spread([case for case in cases if "float64" not in case.label])  # that one serves tests
    rows = [(case, batch) for case in order for batch in cases[case][:1]]
    rows += [(case, batch) for case in order for batch in cases[case][1:]]
    seen = set[str]()
    for place, (case, batch) in enumerate(rows):
        names = [name for name in PROVIDERS if name != "liger" or case.op in LIGER]
        if dry:  # the interpreter and the compiler take seconds each
            names = [n for n in names if n == "eager" or (n != "compile" and case.op not in seen)]
        seen.add(case.op)
        if clock.left == 0.0:
            found.found["not_reached"] = [f"{c.op} {c.label} B={b}" for c, b in rows[place:]]
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
    parser.add_argument("--ops", nargs="+", help="only these ops")
    parser.add_argument(
        "--workload", nargs="+", metavar="NAME", default=[], help=f"among {', '.join(WORKLOADS)}"
    )
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    parser.budget(600.0)
    given = parser.parse_args(words)
    if not given.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry runs on the CPU")
    try:
        workloads = [named(name) for name in given.workload]
    except ValueError as error:
        parser.error(f"{error}")
    narrow = {"width": DRY_WIDTH} if given.dry else {}
    sizes = {case: [w.batch] for w in workloads for case in of_update(w._replace(**narrow))}
    cases = sizes or {case: batches_of(case) for case in all_cases()}
    known = sorted({case.op for case in cases})
    if unknown := [name for name in given.ops or () if name not in known]:
        parser.error(f"unknown op {unknown[0]}; there are {', '.join(known)}")
    asked = {
        case: [DRY_BATCH] if given.dry else own
        for case, own in cases.items()
        if case.op in (given.ops or known)
    }
    found = Results("kernels", given.json or given.save, dry=given.dry)
    return run(found, asked, torch.device("cpu" if given.dry else "cuda"), given.budget, given.dry)


if __name__ == "__main__":
    sys.exit(main())
