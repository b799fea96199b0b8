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
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import roofline
import torch
from bench_limits import machine
from harness import (
    ROUNDS,
    TIME_UP,
    Clock,
    Parser,
    Results,
    Unavailable,
    interleave,
    one_core,
    out_of_memory,
    positive,
    threads,
    told,
)
from parts import parts_of
from workloads import WORKLOADS, Workload, named

from peers.updates import (
    BUILDERS,
    CARTPOLE,
    OURS,
    PROVIDERS,
    Expected,
    Provider,
    Subject,
    checked,
    expected,
    floor,
    memory,
    release,
    require_memory,
    tensor_cores,
)

UNIT = "updates/s"
DEFAULTS = {"cpu": ("ours", "plain"), "cuda": ("ours-bf16", "ours-tf32", "plain", "compiled", "jax")}
FLOOR = {"cpu": "torch.bmm", "cuda": "roofline"}
HEAVY = 4e9  # bytes of plain PyTorch; a CPU is not given more unless it is asked to
COMPILING = 30.0  # seconds of torch.compile at one size, on one core with an empty cache
LONGEST = {"cpu": float("inf"), "cuda": 4.0}  # seconds of timing at one size; a quiet machine needs no more
KEPT = 0.1  # share of the time for parts or kernels
MARK = "spin_kernel"  # what torch.cuda._sleep launches


def compare(
    found: Results,
    subject: Subject,
    names: Sequence[str],
    clock: Clock,
    roof: roofline.Machine,
    left: float = 0.0,
) -> None:
    """One size: providers are built, compared with plain PyTorch, and timed in turns; then the parts of ours.

    left: seconds of this size and of those after it.
    """
    cuda, missing, start = subject.device == "cuda", dict[str, BaseException](), time.perf_counter()
    try:
        require_memory(subject)
        known = expected(subject)
        require_time(time.perf_counter() - start, len(names), left)
    except Exception as error:
        missing = dict.fromkeys(names, error if isinstance(error, Unavailable) else Unavailable(told(error)))
        found.case(subject.case, {}, UNIT, missing=missing, at=subject.at)
        return
    finally:
        release(subject.device)
    together = subject.bytes(len(names)) < 0.85 * memory(subject.device)
    groups = [[*names]] if together else [[name] for name in names]
    times, precisions = dict[str, list[float]](), dict[str, str]()
    for place, group in enumerate(groups):  # which grows where one has no room beside the others
        share = Clock(clock.share(len(groups) - place))
        providers = dict(built(group, subject, known, share, missing))
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
    scale = 1.0  # times are those of an update
    found.case(subject.case, order, UNIT, scale, ours=best, missing=lost, floor=floors, at=subject.at)


def built(
    names: Sequence[str], subject: Subject, known: Expected, clock: Clock, missing: dict[str, BaseException]
) -> Iterator[tuple[str, Provider]]:
    """Those that compute what plain PyTorch does; what compiles for long comes last."""
    slow = subject.device == "cpu" and subject.backend == "inductor"
    for name in sorted(names, key=lambda name: slow and name == "compiled"):
        try:
            if slow and name == "compiled" and clock.left < COMPILING:
                raise Unavailable(
                    f"compiling takes about {COMPILING:.0f} s, more than is left; raise --budget"
                )
            yield name, checked(name, subject, known)
        except Exception as error:  # of one provider: the others go on
            missing[name] = error
        release(subject.device)


def timed(
    found: Results, subject: Subject, providers: Mapping[str, Provider], clock: Clock, roof: roofline.Machine
) -> dict[str, list[float]]:
    """Seconds per update of the providers, and on a CPU of their products alone, in turns."""
    work = {name: provider.call for name, provider in providers.items()}
    if providers and subject.device == "cpu":
        work[FLOOR["cpu"]] = floor(subject)

    def finish(name: str) -> object:
        return providers[name].finish() if name in providers else None

    kept = KEPT * clock.left if "ours" in providers else 0.0
    seconds = min(clock.left - kept, LONGEST[subject.device])
    each = {
        name: [t / subject.updates for t in ts]
        for name, ts in interleave(work, seconds, finish=finish).items()
    }
    notes = {name: note for name, provider in providers.items() if (note := provider.note()) is not None}
    if notes:
        found.found.setdefault("notes", {})[subject.case] = notes
    if "ours" in providers:
        floors = roofline.parts(subject.sizes, "fp32", roof)
        keep_parts(found, subject, floors, parts_of(providers["ours"].call, kept, subject.updates))
    return each


def keep_parts(
    found: Results, subject: Subject, floors: Mapping[str, float], measured: Mapping[str, Any] | None = None
) -> None:
    """The floor of each part of an update, and what it takes where that was measured."""
    rows = [{"case": subject.case, "part": part, "floor": floors.get(part)} for part in measured or floors]
    found.found.setdefault("parts", []).extend(row | (measured or {}).get(row["part"], {}) for row in rows)


def require_time(took: float, count: int, left: float) -> None:
    """Unavailable where a comparison has no room in the time that is left, as the expected updates took."""
    takes = took / 2 * (count + 1) * (3 + ROUNDS)
    if takes > max(1.0, left):
        raise Unavailable(
            f"a comparison takes about {takes:.0f} s, more than is left of the budget; raise --budget"
        )


def count_kernels(subjects: Sequence[Subject], names: Sequence[str], clock: Clock) -> dict[str, Any]:
    """Of ours at each size: profile one call, the replay of a graph, with the copies of its inputs.

    In one session for all: a second one may see nothing once graphs were captured after the first.
    """
    from torch.profiler import ProfilerActivity, profile

    def mark() -> None:
        torch.cuda._sleep(1000)
        torch.cuda.synchronize()

    done = list[tuple[Subject, str]]()
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for subject, name in ((s, n) for s in subjects for n in names if n in OURS):
            if clock.left == 0.0:
                break
            provider = BUILDERS[name](subject)
            for _ in range(5):
                provider.call()
            provider.finish()
            mark()
            provider.call()
            mark()
            done.append((subject, name))
            del provider
            release("cuda")
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    ran = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    counted: dict[str, Any] = {}
    for (subject, name), launched in zip(done, between(ran), strict=False):
        counted.setdefault(subject.case, {})[name] = counts(launched, subject.updates)
    return counted


def between(names: Sequence[str], mark: str = MARK) -> list[list[str]]:
    """What ran between the first mark and the second, the third and the fourth, ..."""
    places = [place for place, name in enumerate(names) if mark in name]
    return [list(names[a + 1 : b]) for a, b in zip(places[::2], places[1::2], strict=False)]


def counts(names: Sequence[str], updates: int) -> dict[str, float]:
    """Kernels, and copies and fills of memory, per update."""
    moved = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": (len(names) - moved) / updates, "copies": moved / updates}


def run(
    found: Results, subjects: Sequence[Subject], names: Sequence[str], seconds: float, *, dry: bool = False
) -> None:
    """Size after size, in equal shares of the time, once the limits of the machine are known."""
    device = subjects[0].device
    roof = machine(device, dry=dry)
    found.found |= {"limits": roof._asdict(), "floor": FLOOR[device]}
    if device == "cpu":
        expected(
            Subject(CARTPOLE._replace(width=8, batch=8))
        )  # the first optimizer loads modules for seconds
    clock = Clock(seconds * (1.0 - KEPT) if device == "cuda" else seconds)
    with tensor_cores(device):
        for place, subject in enumerate(subjects):
            if place and clock.left == 0.0:
                missing = dict.fromkeys(names, Unavailable(TIME_UP))
                found.case(subject.case, {}, UNIT, missing=missing, at=subject.at)
                continue
            share = Clock(clock.share(len(subjects) - place))
            compare(found, subject, names, share, roof, clock.left)
        if device == "cuda":
            try:
                found.found["kernels_per_update"] = count_kernels(subjects, names, Clock(seconds * KEPT))
            except RuntimeError as error:
                print(f"kernels were not counted: {told(error)}")
    print(f"limits of this machine: {roof.source}")


def shapes(
    workloads: Sequence[Workload], widths: Sequence[int], batches: Sequence[int]
) -> Iterator[Workload]:
    """The workloads, of CartpoleSwingup if there is none, at each width and batch size, or at their own."""
    for workload in workloads or (CARTPOLE,):
        for batch in batches or (workload.batch,):
            for width in widths or (workload.width,):
                yield workload._replace(width=width, batch=batch)


def wanted(names: Sequence[str] | None, device: str) -> list[str]:
    """Providers in their order, ours always among them."""
    asked = set(names or DEFAULTS[device])
    if not asked & set(OURS):
        asked.add("ours")
    if device == "cuda" and "ours" in asked:
        asked = asked - {"ours"} | {"ours-tf32"}
    return [name for name in PROVIDERS if name in asked]


def asked(names: Sequence[str] | None, device: str) -> list[Workload]:
    """The workloads of these names; of no names all, without those that are too much for a CPU."""
    if names:
        return [named(name) for name in names]
    sizes = {w: Subject(w).bytes(1) for w in (WORKLOADS.values() if names is not None else ())}
    heavy = [
        f"{w.name} ({size / 1e9:.0f} GB)" for w, size in sizes.items() if device == "cpu" and size > HEAVY
    ]
    if heavy:
        print(f"left out on a CPU for their memory, name them to run them: {', '.join(heavy)}")
    return [workload for workload, size in sizes.items() if device == "cuda" or size <= HEAVY]


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.device()
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default: of the device")
    parser.add_argument("--workload", nargs="*", metavar="NAME", help=f"among {', '.join(WORKLOADS)}")
    parser.add_argument(
        "--width", type=positive, nargs="+", help="of the critics; 128 256 without a workload"
    )
    parser.add_argument("--batch", type=positive, nargs="+", help="128 without a workload")
    parser.add_argument("--updates", type=positive, help="updates per call: 1 on a CPU, 2 on a GPU")
    parser.add_argument(
        "--threads", type=threads, default=1, help="threads of torch, and of JAX if it is one"
    )
    parser.budget(60.0, "seconds, once limits of this machine are known")
    given = parser.parse_args(words)
    device = parser.device_of(given)
    try:
        workloads = asked(given.workload, device)
    except ValueError as error:
        parser.error(f"{error}")
    if device == "cpu":
        one_core(given.threads)
    usual = ([], []) if workloads else ([128, 256], [128])
    listed = shapes(workloads, given.width or usual[0], given.batch or usual[1])
    updates = given.updates or (2 if device == "cuda" else 1)
    subjects = [Subject(shape, updates, device) for shape in listed]
    found = Results("update", given.save, device=device, updates_per_call=updates)
    run(found, subjects, wanted(given.providers, device), given.budget)
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
