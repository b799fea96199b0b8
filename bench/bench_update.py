"""Updates per second of `brc_fast.BRC` and of the same mathematics by others, beside a floor.

    python bench/bench_update.py [--device cpu|cuda] [--providers ours critic plain compiled jax]
        [--workload NAME ...] [--width 128 ...] [--batch 128 ...] [--threads N] [--budget SECONDS]
        [--save NAME]

ours        in float32; ours-bf16, and on a GPU ours-tf32, with products of lower precision
one-thread  ours on one thread, where --threads gives the others more
critic      plain, but for the critic, its loss and its target, which are `brc_fast.Critic` (docs/critic.md)
plain       PyTorch without anything of ours, with fused optimizers, targets moved in one call, and a critic
            without gradients while the actor learns
compiled    plain through torch.compile, on a GPU in a CUDA graph
jax         the same in JAX with optax, jitted as a whole

Each workload (workloads.py) at its own width and batch size, or at all pairs of --width and --batch. All
start from the same parameters, and updates on the same batches must agree with plain PyTorch's before
anything is timed, in turns. Products of the others are in float32 on a CPU, in TF32 on a GPU. The floor on a
CPU is the time of the update's products alone, each by the fastest of those who can (products.py), in turns
with the rest; the result says whose they are. On a GPU it is a roofline, of the products and AdamW at the
rates that the machine reaches in a large product and in a copy.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import harness
from bench_limits import rate
from harness import (
    TIME_UP,
    Clock,
    Missing,
    Parser,
    Results,
    Unavailable,
    interleave,
    positive,
    quartiles,
    shares,
)
from products import Alone, least, noted
from workloads import CARTPOLE, WORKLOADS

from peers import updates
from peers.updates import BUILDERS, OURS, Provider, Subject, release

DEFAULTS = {"cpu": ("ours", "plain"), "cuda": ("ours-bf16", "ours-tf32", "plain", "compiled", "jax")}
FLOOR = "fastest products"
UPDATES = {"cpu": 1, "cuda": 2}  # per call
COMPILING = 30.0  # seconds of torch.compile at one size, on one core with an empty cache


def compare(found: Results, subject: Subject, names: Sequence[str], clock: Clock, **shown: Any) -> None:
    """One size: providers are built, compared with plain PyTorch, and timed in turns.

    Args:
        shown: `case`, `unit` and `at` of its table.
    """
    shown = {"case": subject.case, "unit": "updates/s"} | (shown or {"at": subject.at})
    missing, times, floors = Missing(), dict[str, list[float]](), dict[str, float]()
    with missing.of(*names):
        known, providers = updates.expected(subject), dict[str, Provider]()
        for name in sorted(names, key=lambda name: name == "compiled"):  # which may take long
            with missing.of(name):
                if name == "compiled" and subject.device == "cpu" and clock.left < COMPILING:
                    told = f"compiling takes about {COMPILING:.0f} s, more than is left; raise --budget"
                    raise Unavailable(told)
                providers[name] = updates.checked(name, subject, known)
            release(subject.device)
        precisions = {name: provider.precision for name, provider in providers.items()}
        alone = dict[str, Alone]()
        if subject.device == "cpu":
            for precision in set(precisions.values()):
                alone[precision] = Alone(partial(subject.agent(precision).update, subject.inputs()[0]))
            found.found.setdefault("products", {})[subject.case] = {p: x.whose for p, x in alone.items()}
        times, least_times = timed(subject, providers, alone, clock)
        for precision in set(precisions.values()) - set(least_times):
            least_times[precision] = roofline(subject, precision)
        floors = {name: least_times[precision] for name, precision in precisions.items()}
        del providers, alone
    release(subject.device)
    best = next((name for name in OURS if name in times), None)
    order = {name: times[name] for name in BUILDERS if name in times}
    found.case(times=order, ours=best, missing=missing, floor=floors, **shown)


def timed(
    subject: Subject, providers: Mapping[str, Provider], alone: Mapping[str, Alone], clock: Clock
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds per update of the providers, and the median of the products alone by precision, in turns."""
    work: dict[str, Any] = {name: provider.call for name, provider in providers.items()} | {**alone}
    ends = {name: provider.finish for name, provider in providers.items()}
    times = interleave(work, clock.left, finish=lambda name: ends[name]() if name in ends else None)
    each = {name: [seconds / subject.updates for seconds in own] for name, own in times.items()}
    return {name: each[name] for name in providers}, {p: quartiles(each[p])[1] for p in alone}


def roofline(subject: Subject, precision: str) -> float:
    """Seconds that this machine needs at least for the products of an update and for what AdamW reads and
    writes (kernels/README.md); what lies between the products is left out."""
    agent = subject.agent(precision)
    kind = {"fp32": "float32", "tf32": "tf32", "bf16": "bfloat16"}[precision]
    bandwidth, operations = rate(subject.device, "copy"), rate(subject.device, f"product {kind} ")
    pairs = noted(partial(agent.update, *subject.inputs()))  # with noise, and so without a graph
    low = 2 if precision == "bf16" else 0  # bytes more: copies are written, and gradients are as wide
    critic, actor = (sum(p.numel() for p in net.parameters()) for net in (agent.critic, agent.actor))
    moved = critic * (36 + low) + actor * 28
    return least(pairs, operations, bandwidth) / subject.updates + moved / bandwidth


def prepare(found: Results, device: str) -> None:
    """Before anything is timed: the first optimizer of a process loads modules for seconds."""
    found.found["floor"] = FLOOR if device == "cpu" else "roofline"
    harness.tensor_cores(device)
    if device == "cpu":
        updates.expected(Subject(CARTPOLE._replace(width=8, batch=8)))


def run(found: Results, subjects: Sequence[Subject], names: Sequence[str], seconds: float) -> None:
    """Size after size, in equal shares of the time."""
    prepare(found, subjects[0].device)
    for subject, clock in shares(subjects, seconds):
        if subject is not subjects[0] and clock.left == 0.0:
            missing = dict.fromkeys(names, Unavailable(TIME_UP))
            found.case(subject.case, {}, "updates/s", missing=missing, at=subject.at)
        else:
            compare(found, subject, names, clock)


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(60.0, workloads="+")
    parser.add_argument("--providers", nargs="+", choices=BUILDERS, help="default: of the device")
    told = "of the critics; 128 256 without a workload"
    parser.add_argument("--width", type=positive, nargs="+", help=told)
    parser.add_argument("--batch", type=positive, nargs="+", help="128 without a workload")
    parser.add_argument("--threads", type=positive, default=1, help="of each, on as many cores (default 1)")
    given = parser.parse_args(words)
    if (device := parser.device(given)) == "cpu":
        harness.use_cores(given.threads)
    usual = ([128, 256], [128]) if given.workload is None else ([], [])
    number, names = UPDATES[device], set(given.providers or DEFAULTS[device])
    if not names & set(OURS) or (device == "cuda" and "ours" in names):
        names = names - {"ours"} | {"ours-tf32" if device == "cuda" else "ours"}
    subjects = [
        Subject(workload._replace(width=width, batch=batch), number, device)
        for workload in ([WORKLOADS[name] for name in given.workload or ()] or [CARTPOLE])
        for batch in given.batch or usual[1] or [workload.batch]
        for width in given.width or usual[0] or [workload.width]
    ]
    found = Results("update", given.save, device=device, updates_per_call=number)
    run(found, subjects, [name for name in BUILDERS if name in names], given.budget)
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
