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

import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from bench_limits import machine
from harness import TIME_UP, Clock, Differs, Missing, Parser, Results, Summary, Unavailable
from roofline import Net
from torch import Tensor
from workloads import Workload

from brc_fast import kernels
from brc_fast.kernels import reference
from brc_fast.kernels.runtime.dispatch import INTERPRETED
from brc_fast.kernels.tools.aot import cases as all_cases
from brc_fast.kernels.tools.cases import Case
from brc_fast.kernels.tools.timing import batches_of, cold, rotated, seconds_per_call
from brc_fast.kernels.tools.tune import disagreement, tensors
from peers.updates import Subject

DRY_BATCH, DRY_WIDTH, EACH = 4, 16, 0.05
# As kernels.tools.tune.SAME_KERNEL, for the twin: in 2 bytes it rounds between operations, and a kernel does
# not. Sound kernels differ by up to 4e-3 then, by 6e-3 in the interpreter, which cuts where a GPU rounds.
LOW = torch.bfloat16
TWIN = {torch.float64: (1e-9, 1e-10), torch.float32: (2e-3, 5e-5)}
TWIN |= dict.fromkeys((torch.float16, LOW), (8e-3, 8e-3))
# Layers pass on what was rounded, and ReLUs turn around: by up to 6e-2 in the interpreter.
DEEP = TWIN | dict.fromkeys((torch.float16, LOW), (0.1, 0.05))
PROVIDERS = ("kernels", "eager", "compile", "liger")
Call = Callable[[], object]


# ---------------------------------------------------------------- providers


@contextmanager
def liger() -> Iterator[None]:
    """Liger's LayerNorm in the twin's place: once per network, with bias, ReLU and residual in PyTorch."""
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


def provider(name: str, device: torch.device) -> tuple[str, AbstractContextManager[None]]:
    """The `impl` to prepare a case with, and the block to do so in; Unavailable where it cannot run here."""
    there = device.type == "cuda" or (name == "kernels" and INTERPRETED)
    if name in ("kernels", "liger") and not there:
        if name == "liger":
            liger().__enter__()  # tells what is not installed
        raise Unavailable("not on this device")
    impl = {"kernels": "triton", "compile": "compile"}.get(name, "reference")
    return impl, liger() if name == "liger" else nullcontext()


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


@contextmanager
def agreeing(case: Case, device: torch.device, batch: int, name: str) -> Iterator[list[Call]]:
    """The calls of a provider, to be made in the block.

    Raises:
        Differs: they are wrong. Unavailable: they cannot be made.
    """
    impl, block = provider(name, device)
    right = results(rotated(case, device, batch, "reference", sets=1)[0]) if name != "eager" else []
    with block:
        calls = rotated(case, device, batch, impl)
        if right and (wrong := disagreement(results(calls[0]), right, allowed(name, case.op, right))):
            raise Differs(f"differs from the twin: {wrong}")
        del right
        yield calls


# ---------------------------------------------------------------- cases


def spread(cases: Sequence[Case]) -> list[Case]:
    """Every op in turn, and of each op cases from all over its list first."""
    per_op: dict[str, list[Case]] = {}
    for case in cases:
        per_op.setdefault(case.op, []).append(case)
    for own in per_op.values():
        own[:] = [own[x] for x in sorted(range(len(own)), key=lambda x: f"{x:032b}"[::-1])]
    return [case for turn in itertools.zip_longest(*per_op.values()) for case in turn if case is not None]


def of_update(workload: Workload) -> Iterator[Case]:
    """What takes the time of an update, at the sizes of a workload: to be run at its batch size."""
    sizes = Subject(workload).sizes
    (actor, critic), number, size = sizes.nets, sizes.parameters, LOW.itemsize

    def pack(device: torch.device, batch: int, impl: str) -> Call:
        seen = torch.randn(batch, sizes.observation, device=device)
        inputs: list[Any] = [seen, torch.randn(batch, sizes.action, device=device), None, None]
        if sizes.embedding:
            inputs[2] = torch.randn(sizes.tasks, sizes.embedding, device=device)
            inputs[3] = torch.randint(sizes.tasks, (batch,), device=device)
        return lambda: kernels.pack_inputs(*inputs, "l2", width=critic.inputs, dtype=LOW, impl=impl)

    def adamw(device: torch.device, batch: int, impl: str) -> Call:
        state = list(torch.randn(4, number, device=device).abs())  # parameter, moments and target
        low, target_low = torch.empty(2, number, device=device, dtype=LOW)
        inputs = [state[0], state[0].to(LOW), *state[1:3], torch.zeros((), device=device)]
        more: dict[str, Any] = {"target": state[3], "low": low, "target_low": target_low, "impl": impl}
        more |= {"learning_rate": 3e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-4}
        return lambda: (kernels.adamw_(*inputs, **more), *inputs, state[3], low, target_low)[1:]

    row = 4 * (sizes.observation + sizes.action) + size * critic.inputs + (8 if sizes.embedding else 0)
    label = f"O={sizes.observation} A={sizes.action} D={sizes.embedding} T={sizes.tasks}"
    yield Case("pack_inputs", f"{workload.name}: {label}", pack, lambda batch: batch * row)
    moved = number * (8 * 4 + 3 * size)
    yield Case("adamw_", f"{workload.name}: P={number} target, copies", adamw, lambda batch: moved)
    for net, networks in ((actor, 1), (critic, sizes.critic.members)):
        yield body(workload.name, net, networks)


def body(name: str, net: Net, networks: int) -> Case:
    """Networks forward and backward: kernels twice and their gradients; inputs, activations and gradients."""

    def prepare(device: torch.device, batch: int, impl: str) -> Call:
        def random(*shape: int) -> Tensor:
            return (torch.randn(shape, device=device) / shape[-2] ** 0.5).to(LOW).requires_grad_()

        leaves = list[Tensor]()
        for inputs in [net.inputs] + [net.width] * (net.layers - 1):
            vectors = torch.rand(3, networks, net.width, device=device)
            leaves += [random(networks, inputs, net.width), *(v.clone().requires_grad_() for v in vectors)]
        bias = torch.zeros(networks, net.outputs, device=device, requires_grad=True)
        leaves += [random(networks, net.width, net.outputs), bias]
        x, seed = random(batch, net.inputs).detach(), random(networks, batch, net.outputs).detach()

        def call() -> object:
            out = kernels.bronet(x, *leaves, impl=impl)
            return out, *torch.autograd.grad(out, leaves, seed)

        return call

    per_row = net.inputs + 6 * net.width * net.layers + 2 * net.outputs
    label = f"{name}: N={networks} I={net.inputs} H={net.width} depth={net.depth} K={net.outputs} bfloat16"
    held = networks * LOW.itemsize
    return Case("bronet", label, prepare, lambda batch: held * (3 * net.parameters + per_row * batch))


# ---------------------------------------------------------------- all of them


def measure(
    found: Results, case: Case, device: torch.device, batch: int, names: Sequence[str], each: float
) -> None:
    """One case; RuntimeError where an error has spoilt the device for good."""
    times, missing = dict[str, Summary](), Missing()
    for name in names:
        try:
            with agreeing(case, device, batch, name) as calls:
                times[name] = Summary(*seconds_per_call(calls, device, each))
        except Exception as error:  # of one provider: the others go on
            if device.type == "cuda":
                torch.cuda.synchronize()
            peer = name != "kernels" and isinstance(error, Differs)  # which costs no more than its own time
            missing[name] = Unavailable(str(error)) if peer else error
    floor = dict.fromkeys(names, case.bytes(batch) / found.found["limits"]["bandwidth"])
    label = f"{case.op} {case.label} B={batch}" + ("" if cold(case.bytes(batch), device) else " L2")
    found.case(label, times, "us", ours="kernels", missing=missing, floor=floor)


def run(
    found: Results, cases: Mapping[Case, Sequence[int]], device: torch.device, seconds: float, dry: bool
) -> int:
    """Every case at its first batch size, then at the others, until the time is up; the exit code."""
    clock, found.found["limits"] = Clock(seconds), machine(device.type, dry=dry)._asdict()
    order = spread([case for case in cases if "float64" not in case.label])  # that one serves tests
    rows = [(case, batch) for case in order for batch in cases[case][:1]]
    rows += [(case, batch) for case in order for batch in cases[case][1:] if not dry]
    seen = set[str]()
    for case, batch in rows:
        names = [name for name in PROVIDERS if name != "liger" or case.op == "bias_layer_norm"]
        if dry:  # the interpreter and the compiler take seconds each
            names = [n for n in names if n == "eager" or (n != "compile" and case.op not in seen)]
        seen.add(case.op)
        if clock.left == 0.0:
            left = rows[rows.index((case, batch)) :]
            found.found["not_reached"] = [f"{case.op} {case.label} B={batch}" for case, batch in left]
            print(f"{len(left)} cases were not reached: {TIME_UP}")
            break
        try:
            measure(found, case, device, DRY_BATCH if dry else batch, names, 0.0 if dry else EACH)
        except RuntimeError as error:
            found.found |= {"status": "failed", "reason": f"{case.op} {case.label}: {error}"}
            print(f"aborted: {found.found['reason']}", file=sys.stderr)
            return found.end() or 1
    return found.end()


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(600.0, workloads="+")
    parser.add_argument("--ops", nargs="+", help="only these ops")
    parser.add_argument("--json", type=Path, help="write the results here")
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    given = parser.parse_args(words)
    if not given.dry and not torch.cuda.is_available():
        parser.error("torch sees no CUDA device; --dry runs on the CPU")
    narrow = {"width": DRY_WIDTH} if given.dry else {}
    sizes = {case: [w.batch] for w in given.workload or () for case in of_update(w._replace(**narrow))}
    cases = sizes or {case: batches_of(case) for case in all_cases()}
    known = sorted({case.op for case in cases})
    if unknown := [name for name in given.ops or () if name not in known]:
        parser.error(f"unknown op {unknown[0]}; there are {', '.join(known)}")
    asked = {case: own for case, own in cases.items() if case.op in (given.ops or known)}
    found = Results("kernels", given.json or given.save, dry=given.dry)
    return run(found, asked, torch.device("cpu" if given.dry else "cuda"), given.budget, given.dry)


if __name__ == "__main__":
    sys.exit(main())
