"""Updates per second of `brc_fast.BRC` and of the same mathematics by others, beside a floor.

    python bench/bench_update.py [--device cpu|cuda] [--providers ours critic plain compiled jax]
        [--workload [NAME ...]] [--width 128 ...] [--batch 128 ...] [--updates U]
        [--budget SECONDS] [--save NAME]

ours        float32 on a CPU; on a GPU ours-tf32 and ours-bf16, in CUDA graphs
critic      plain, but for the critic, its loss and its target, which are `brc_fast.Critic` (docs/critic.md)
plain       PyTorch without anything of ours, with fused optimizers, targets moved in one call, and a critic
            without gradients while the actor learns
compiled    plain through torch.compile, on a GPU in a CUDA graph
jax         the same in JAX with optax, jitted as a whole

Each workload (workloads.py) at its own width and batch size, or at all pairs of --width and --batch. Without
--workload it is mjx/CartpoleSwingup; --workload alone means all of them, on a CPU those that are small.
In one process, interleaved; where memory is too small for all, one after the other. All start from the same
parameters, and updates on the same batches must agree with plain PyTorch's before anything is timed.
Products of the others are in float32 on a CPU, in TF32 on a GPU.
The floor: on a CPU the time of the update's matrix products alone by torch.bmm, interleaved with the rest;
another library of products may beat it. On a GPU the roofline of its kernels (roofline.py), of this machine's
limits (bench_limits.py). A tenth of the time goes into the parts of ours on a CPU (parts.py), and into
counting its kernels on a GPU.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

import parts
import roofline
import torch
from bench_limits import machine
from harness import (
    ROUNDS,
    TIME_UP,
    Clock,
    Missing,
    Parser,
    Results,
    Unavailable,
    interleave,
    one_core,
    out_of_memory,
    positive,
    told,
)  # fmt: skip
from workloads import WORKLOADS, Workload

from peers import updates
from peers.updates import BUILDERS, CARTPOLE, OURS, PROVIDERS, Expected, Provider, Subject, release

DEFAULTS = {"cpu": ("ours", "plain"), "cuda": ("ours-bf16", "ours-tf32", "plain", "compiled", "jax")}
FLOOR = {"cpu": "torch.bmm", "cuda": "roofline"}
HEAVY = 4e9  # bytes of plain PyTorch; a CPU is not given more unless it is asked to
COMPILING = 30.0  # seconds of torch.compile at one size, on one core with an empty cache
INFINITE = float("inf")
LONGEST = {"cpu": INFINITE, "cuda": 4.0}  # seconds of timing at one size; a quiet machine needs no more
KEPT = 0.1  # share of the time for parts or kernels
MARK = "spin_kernel"  # what torch.cuda._sleep launches


def compare(
    found: Results,
    subject: Subject,
    names: Sequence[str],
    clock: Clock,
    roof: roofline.Machine,
    left: float = 0.0,
    **shown: Any,
) -> None:
    """One size: providers are built, compared with plain PyTorch, and timed in turns; then the parts of ours.

    Args:
        left: seconds of this size and of those after it. shown: `case`, `unit` and `at` of its table.
    """
    shown = {"case": subject.case, "unit": "updates/s"} | (shown or {"at": subject.at})
    cuda, missing, start = subject.device == "cuda", Missing(), time.perf_counter()
    try:
        updates.require_memory(subject)
        known = updates.expected(subject)
        takes = (time.perf_counter() - start) / 2 * (len(names) + 1) * (3 + ROUNDS)
        if not cuda and takes > max(1.0, left, clock.left):
            raise Unavailable(f"a comparison takes about {takes:.0f} s, more than is left; raise --budget")
    except Exception as error:
        found.case(times={}, missing=dict.fromkeys(names, error), **shown)
        return
    finally:
        release(subject.device)
    together = subject.bytes(len(names)) < 0.85 * updates.memory(subject.device)
    groups = [[*names]] if together else [[name] for name in names]
    times, precisions = dict[str, list[float]](), dict[str, str]()
    for place, group in enumerate(groups):  # which grows where one has no room beside the others
        share = Clock(clock.left / (len(groups) - place))
        providers = built(group, subject, known, share, missing)
        try:
            times |= timed(found, subject, providers, share, roof)
            precisions |= {name: provider.precision for name, provider in providers.items()}
        except Exception as error:
            missing |= dict.fromkeys(providers, error)
        if len(group) > 1:
            groups += [[name] for name in group if name in missing and out_of_memory(missing[name])]
        del providers
        release(subject.device)
    best = next((name for name in OURS if name in times), None)
    floors: Any = FLOOR["cpu"]
    if cuda:
        floors = {name: roofline.floor(subject.sizes, precisions[name], roof) for name in times}
        keep_parts(found, subject, roofline.parts(subject.sizes, precisions[best], roof) if best else {})
    order = {name: times[name] for name in (*PROVIDERS, FLOOR["cpu"]) if name in times}
    lost = {name: missing[name] for name in PROVIDERS if name in missing and name not in times}
    found.case(times=order, ours=best, missing=lost, floor=floors, **shown)


def built(
    names: Sequence[str], subject: Subject, known: Expected, clock: Clock, missing: Missing
) -> dict[str, Provider]:
    """Those that compute what plain PyTorch does; what compiles for long comes last."""
    found, slow = dict[str, Provider](), subject.device == "cpu" and subject.backend == "inductor"
    for name in sorted(names, key=lambda name: slow and name == "compiled"):
        try:
            if slow and name == "compiled" and clock.left < COMPILING:
                raise Unavailable(
                    f"compiling takes about {COMPILING:.0f} s, more than is left; raise --budget"
                )
            found[name] = updates.checked(name, subject, known)
        except Exception as error:  # of one provider: the others go on
            missing[name] = error
        release(subject.device)
    return found


def timed(
    found: Results, subject: Subject, providers: Mapping[str, Provider], clock: Clock, roof: roofline.Machine
) -> dict[str, list[float]]:
    """Seconds per update of the providers, and on a CPU of their products alone, in turns."""
    work = {name: provider.call for name, provider in providers.items()}
    if providers and subject.device == "cpu":
        work[FLOOR["cpu"]] = updates.floor(subject)

    def finish(name: str) -> object:
        return providers[name].finish() if name in providers else None

    kept = KEPT * clock.left if "ours" in providers else 0.0
    each = interleave(work, min(clock.left - kept, LONGEST[subject.device]), finish=finish)
    for name, provider in providers.items():
        if (note := provider.note()) is not None:
            found.found.setdefault("notes", {})[f"{subject.case}, {name}"] = note
    if "ours" in providers:
        floors = roofline.parts(subject.sizes, "fp32", roof)
        measured = parts.measured(providers["ours"].call, kept, subject.updates)
        keep_parts(found, subject, floors, measured)
    return {name: [seconds / subject.updates for seconds in own] for name, own in each.items()}


def keep_parts(
    found: Results, subject: Subject, floors: Mapping[str, float], measured: Mapping[str, Any] | None = None
) -> None:
    """The floor of each part of an update, and what it takes where that was measured."""
    rows = [{"case": subject.case, "part": part, "floor": floors.get(part)} for part in measured or floors]
    found.found.setdefault("parts", []).extend(row | (measured or {}).get(row["part"], {}) for row in rows)


def count_kernels(subjects: Sequence[Subject], names: Sequence[str], clock: Clock) -> dict[str, Any]:
    """Of ours at each size: profile one call, the replay of a graph, with the copies of its inputs.

    In one session for all: a second one may see nothing once graphs were captured after the first.
    """
    from torch.profiler import ProfilerActivity, profile

    done = list[tuple[str, int]]()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for subject, name in ((s, n) for s in subjects for n in names if n in OURS):
            if clock.left == 0.0:
                break
            provider = BUILDERS[name](subject)
            for _ in range(updates.WARMUP):
                provider.call()
            for call in (provider.finish, provider.call):  # between two marks
                call()
                torch.cuda.synchronize()
                torch.cuda._sleep(1000)
                torch.cuda.synchronize()
            done.append((f"{subject.case}, {name}", subject.updates))
            del provider
            release("cuda")
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ran = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    each = zip(done, between(ran), strict=False)
    return {case: counts(launched, number) for (case, number), launched in each}


def between(names: Sequence[str], mark: str = MARK) -> list[list[str]]:
    """What ran between the first mark and the second, the third and the fourth, ..."""
    places = [place for place, name in enumerate(names) if mark in name]
    return [list(names[a + 1 : b]) for a, b in zip(places[::2], places[1::2], strict=False)]


def counts(names: Sequence[str], number: int) -> dict[str, float]:
    """Kernels, and copies and fills of memory, per update."""
    moved = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": (len(names) - moved) / number, "copies": moved / number}


def warm() -> None:
    """The first optimizer of a process loads modules for seconds."""
    updates.expected(Subject(CARTPOLE._replace(width=8, batch=8)))


def run(
    found: Results, subjects: Sequence[Subject], names: Sequence[str], seconds: float, *, dry: bool = False
) -> None:
    """Size after size, in equal shares of the time, once the limits of the machine are known."""
    device = subjects[0].device
    roof = machine(device, dry=dry)
    found.found |= {"limits": roof._asdict(), "floor": FLOOR[device]}
    if device == "cpu":
        warm()
    clock = Clock(seconds * (1.0 - KEPT) if device == "cuda" else seconds)
    with updates.tensor_cores(device):
        for place, subject in enumerate(subjects):
            if place and clock.left == 0.0:
                missing = dict.fromkeys(names, Unavailable(TIME_UP))
                found.case(subject.case, {}, "updates/s", missing=missing, at=subject.at)
            else:
                share = Clock(clock.left / (len(subjects) - place))
                compare(found, subject, names, share, roof, INFINITE if dry else clock.left)
        if device == "cuda":
            try:
                found.found["kernels_per_update"] = count_kernels(subjects, names, Clock(seconds * KEPT))
            except RuntimeError as error:
                print(f"kernels were not counted: {told(error)}")
    print(f"limits of this machine: {roof.source}")


def asked(given: Sequence[Workload] | None, device: str) -> Sequence[Workload]:
    """The workloads that were named; where none was all, without those that are too much for a CPU."""
    if given is None:
        return [CARTPOLE]
    sizes = {workload: Subject(workload).bytes(1) for workload in WORKLOADS.values()}
    heavy = {w: size for w, size in sizes.items() if device == "cpu" and size > HEAVY}
    if heavy and not given:
        names = ", ".join(f"{w.name} ({size / 1e9:.0f} GB)" for w, size in heavy.items())
        print(f"left out on a CPU for their memory, name them to run them: {names}")
    return given or [workload for workload in sizes if workload not in heavy]


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(60.0, workloads="*")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default: of the device")
    parser.add_argument(
        "--width", type=positive, nargs="+", help="of the critics; 128 256 without a workload"
    )
    parser.add_argument("--batch", type=positive, nargs="+", help="128 without a workload")
    parser.add_argument("--updates", type=positive, help="updates per call: 1 on a CPU, 2 on a GPU")
    parser.add_argument("--threads", type=positive, default=1, help="of torch, and of JAX if it is one")
    given = parser.parse_args(words)
    if (device := parser.device(given)) == "cpu":
        one_core(given.threads)
    usual = ([128, 256], [128]) if given.workload is None else ([], [])
    number, names = given.updates or (2 if device == "cuda" else 1), set(given.providers or DEFAULTS[device])
    if not names & set(OURS) or (device == "cuda" and "ours" in names):
        names = names - {"ours"} | {"ours-tf32" if device == "cuda" else "ours"}
    subjects = [
        Subject(workload._replace(width=width, batch=batch), number, device)
        for workload in asked(given.workload, device)
        for batch in given.batch or usual[1] or [workload.batch]
        for width in given.width or usual[0] or [workload.width]
    ]
    found = Results("update", given.save, device=device, updates_per_call=number)
    run(found, subjects, [name for name in PROVIDERS if name in names], given.budget)
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
