"""Updates per second of `brc_fast.BRC` and of the same mathematics by others, beside the least it can take.

    python bench/bench_update.py [--device cpu|cuda] [--providers ours plain compiled jax]
        [--workload [NAME ...]] [--width 128 ...] [--batch 128 ...] [--updates U]
        [--budget SECONDS] [--save NAME]

ours        float32 on a CPU; on a GPU ours-tf32 and ours-bf16, in CUDA graphs
plain       PyTorch without anything of ours
compiled    the same through torch.compile with fused optimizers, on a GPU in a CUDA graph
jax         the same in JAX with optax, jitted as a whole

Each workload (workloads.py) at its own width and batch size, or at all pairs of --width and --batch. Without
--workload it is mjx/CartpoleSwingup; --workload alone means all of them, on a CPU those that are small.
In one process, interleaved; where memory is too small for all, one after the other. All start from the same
parameters, and updates on the same batches must agree with plain PyTorch's before anything is timed.
Products of the others are in float32 on a CPU, in TF32 on a GPU.
The floor: on a CPU the time of the update's matrix products alone, interleaved with the rest; on a GPU the
roofline of its kernels (roofline.py), of this machine's limits (machines.py). On a CPU a tenth of the time
goes into measuring the parts of ours (update_parts.py), and a size is left out, with the reason, where the
roofline tells that a comparison takes longer than the budget.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import roofline
import torch
from harness import (
    Measurement,
    absent,
    equality,
    interleave,
    measured,
    median_ratio,
    quartiles,
    refusal,
    write,
)
from machines import machine as limits_of
from update_parts import measured_parts
from update_providers import (
    BUILDERS,
    CARTPOLE,
    DIFFERS,
    OURS,
    PROVIDERS,
    Expected,
    Products,
    Provider,
    Subject,
    Unavailable,
    difference,
    expected,
    fits,
    loaded,
    out_of_memory,
    release,
    taken,
    tensor_cores,
    too_large,
)
from workloads import WORKLOADS, Workload, named

DEFAULTS = {"cpu": ("ours", "plain"), "cuda": ("ours-bf16", "ours-tf32", "plain", "compiled", "jax")}
WARMUP = {"cpu": 1, "cuda": 5}  # calls: ours captures its two graphs in the second and the third
ROUND = 0.05  # seconds of a provider's calls in one round, if these are at least one and at most MOST
MOST = 100
ROUNDS = 3  # at least
LONGEST = {"cpu": float("inf"), "cuda": 4.0}  # seconds of timing at one size; a quiet machine needs no more
HEAVY = 4e9  # bytes of plain PyTorch; a CPU is not given more unless it is asked to
COUNTED = 0.1  # share of the time that is kept: on a GPU for counting kernels, on a CPU for parts
PARTS_UPDATES, PARTS_FREE = 2 + 2 * ROUNDS, 1.0  # at least of the parts; seconds of them that may come on top
MARK = "spin_kernel"  # what torch.cuda._sleep launches

Times = dict[str, list[float]]


# ---------------------------------------------------------------- one size


class Pair:
    """One size: what was found, and the reason of each provider that has no time."""

    def __init__(
        self, subject: Subject, machine: roofline.Machine | None, limits: roofline.Machine | None = None
    ) -> None:
        self.subject, self.machine = subject, machine
        self.limits = limits  # for the floors of the parts, which are measured where it is given
        self.parts: dict[str, Any] = {}
        self.times: Times = {}  # seconds per update, round by round
        self.groups: list[list[str]] = []  # providers of one interleaved run
        self.precision: dict[str, str] = {}
        self.missing: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.memory: dict[str, int] = {}
        self.kernels: dict[str, dict[str, float]] = {}

    def ratio(self, name: str, other: str) -> tuple[float, float, float]:
        """How many times as long as the other, with quartiles; round by round where they ran together."""
        if any(name in group and other in group for group in self.groups):
            return median_ratio(self.times[name], self.times[other])
        (low, middle, high), (least, half, most) = map(quartiles, (self.times[name], self.times[other]))
        return middle / half, low / most, high / least

    @property
    def base(self) -> str | None:
        """What ratios are to: ours in the precision of the others, if it has a time."""
        return next((name for name in OURS if name in self.times), None)

    def floor(self, name: str) -> float | None:
        """Seconds of an update that this provider cannot beat."""
        if self.machine is not None:
            return roofline.floor(self.subject.sizes, self.precision[name], self.machine)
        return statistics.median(self.times["products"]) if "products" in self.times else None

    def over_floor(self, name: str) -> float | None:
        floor = self.floor(name)
        if floor is None:
            return None
        if self.machine is None:
            return self.ratio(name, "products")[0]
        return statistics.median(self.times[name]) / floor

    def row(self) -> dict[str, Any]:
        names = [name for name in PROVIDERS if name in self.times]
        base = self.base
        return {
            "case": self.subject.case,
            "workload": self.subject.workload.name,
            "observation": self.subject.workload.observation,
            "action": self.subject.workload.action,
            "tasks": self.subject.workload.tasks,
            "width": self.subject.width,
            "actor_width": self.subject.actor_width,
            "batch": self.subject.size,
            "updates_per_call": self.subject.updates,
            "device": self.subject.device,
            "parameters": roofline.parameters(self.subject.sizes)[1],
            "precision": {name: self.precision[name] for name in names},
            "updates_per_second": {name: 1.0 / statistics.median(self.times[name]) for name in names},
            "ratios_to": base,
            "ratios": {n: self.ratio(n, base) for n in names if n != base} if base is not None else {},
            "floor": "roofline" if self.machine is not None else "products",
            "floor_seconds": {name: self.floor(name) for name in names},
            "times_floor": {name: self.over_floor(name) for name in names},
            "rounds": {name: len(self.times[name]) for name in names},
            "interleaved": self.groups,
            "kernels_per_update": self.kernels,
            "peak_memory_bytes": self.memory,
            "missing": self.missing,
            "notes": self.notes,
            **self.parts,
        }

    def measurements(self) -> list[Measurement]:
        """Updates per second of every provider and of its floor; or why there are none."""
        out = []
        for name in PROVIDERS:
            told = self.subject.case, name
            if name in self.times:
                floor = self.floor(name)
                rates = [1.0 / seconds for seconds in self.times[name]]
                out.append(
                    measured(*told, rates, "updates/s", "more", None if floor is None else 1.0 / floor)
                )
            elif name in self.missing:
                out.append(absent(*told, self.missing[name], "updates/s", "more"))
        return out


def told(error: BaseException) -> str:
    if isinstance(error, Unavailable | ValueError):
        return str(error)
    if out_of_memory(error):
        return "out of memory"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def ready(name: str, pair: Pair, known: Expected) -> Provider:
    """Built, compared with plain PyTorch and warm; Unavailable if it computes something else."""
    cuda = pair.subject.device == "cuda"
    if reason := too_large(pair.subject, name):
        raise Unavailable(reason)
    before = torch.cuda.memory_allocated() if cuda else 0
    provider = BUILDERS[name](pair.subject)
    if cuda:
        release("cuda")
        torch.cuda.reset_peak_memory_stats()
    wrong = difference(provider, pair.subject, known)
    if wrong is not None:
        raise Unavailable(wrong)
    for _ in range(WARMUP[pair.subject.device]):
        provider.call()
    provider.finish()
    pair.precision[name] = provider.precision
    if provider.note is not None:
        pair.notes[name] = provider.note
    if cuda and name != "jax":  # whose memory PyTorch does not see
        pair.memory[name] = torch.cuda.max_memory_allocated() - before
    return provider


def repeated(provider: Provider, calls: int) -> None:
    for _ in range(calls):
        provider.call()
    provider.finish()


def timed(providers: dict[str, Provider], subject: Subject, seconds: float) -> Times:
    """Seconds per update in rounds. Each provider makes its calls of a round and then waits for them."""
    calls, work, turn = {}, {}, ROUND
    if subject.device == "cpu":
        turn = min(ROUND, seconds / (ROUNDS * len(providers)))
    for name, provider in providers.items():
        start = time.perf_counter()
        repeated(provider, 1)
        calls[name] = max(1, min(MOST, int(turn / (time.perf_counter() - start))))
        work[name] = partial(repeated, provider, calls[name])
    found = interleave(work, seconds=min(seconds, LONGEST[subject.device]), calls=1, warmup=0)
    return {name: [t / (calls[name] * subject.updates) for t in values] for name, values in found.items()}


def run_group(
    names: Sequence[str], pair: Pair, known: Expected, seconds: float, deadline: float
) -> list[str]:
    """Time these together; returns those that had no room beside the others."""
    start, crowded, alone = time.perf_counter(), [], len(names) == 1
    providers: dict[str, Provider] = {}
    for name in names:
        if (pair.times or providers) and time.perf_counter() > deadline:
            pair.missing[name] = "time was up"
            continue
        try:
            providers[name] = ready(name, pair, known)
        except Exception as error:  # of one provider: the others go on
            if out_of_memory(error) and not alone:
                crowded.append(name)
            else:
                pair.missing[name] = told(error)
        release(pair.subject.device)
    if not providers:
        return crowded
    if pair.machine is None:
        providers["products"] = Products(pair.subject)
    try:
        left = seconds - (time.perf_counter() - start)
        split = COUNTED if pair.limits is not None and "ours" in providers else 0.0
        pair.times |= timed(providers, pair.subject, max(0.0, left * (1.0 - split)))
        pair.groups.append(list(providers))
        if split:
            took = PARTS_UPDATES * pair.subject.updates * statistics.median(pair.times["ours"])
            if took > max(PARTS_FREE, deadline - time.perf_counter()):
                pair.parts = {"parts_missing": "time was up"}
            else:
                given = max(0.0, left * split)
                pair.parts = measured_parts(providers["ours"], pair.subject, given, pair.limits)
    except Exception as error:
        if out_of_memory(error) and not alone:
            crowded = [name for name in names if name not in pair.missing]
        else:
            pair.missing |= {name: told(error) for name in providers if name in PROVIDERS}
    return crowded


def compare(
    subject: Subject,
    providers: Sequence[str],
    seconds: float,
    machine: roofline.Machine | None = None,
    deadline: float = float("inf"),
    limits: roofline.Machine | None = None,
) -> Pair:
    """Time the providers at one size, together where they fit."""
    pair, start = Pair(subject, machine, limits), time.perf_counter()
    try:
        if reason := too_large(subject, "plain"):
            raise Unavailable(reason)
        known = expected(subject)
    except Exception as error:
        pair.missing = {name: f"nothing to compare with: {told(error)}" for name in providers}
        return pair
    finally:
        release(subject.device)
    waiting = list(providers)
    if fits(subject, waiting):
        left = seconds - (time.perf_counter() - start)
        waiting = run_group(waiting, pair, known, left, deadline)
        release(subject.device)
    for index, name in enumerate(waiting):
        left = seconds - (time.perf_counter() - start)
        run_group([name], pair, known, left / (len(waiting) - index), deadline)
        release(subject.device)
    return pair


# ---------------------------------------------------------------- the budget of a CPU


class Least(NamedTuple):
    """What a size takes at the least, and why the budget has no room for it."""

    seconds: float
    reason: str | None = None


def least_updates(subject: Subject, count: int) -> int:
    """Of a comparison of so many providers: checks with plain PyTorch, warm-ups, a trial and rounds, and the
    products alone."""
    checks, timed = subject.calls * (count + 1), (1 + ROUNDS) * (count + 1)
    return subject.updates * (checks + WARMUP["cpu"] * count + timed)


def planned(
    subjects: Sequence[Subject], count: int, seconds: float, machine: roofline.Machine
) -> list[Least]:
    """Of each size with so many providers. What is refused leaves its time to the sizes after it."""
    found, left = list[Least](), seconds
    for subject in subjects:
        if too_large(subject, "plain"):
            found.append(Least(0.0))
            continue
        each, updates = roofline.floor(subject.sizes, "fp32", machine), least_updates(subject, count)
        if each * updates <= left:
            found.append(Least(each * updates))
            left -= each * updates
            continue
        allowed = f"the budget of {seconds:g} s allows"
        if each * updates <= seconds:
            allowed = f"other sizes leave of the budget of {seconds:g} s"
        takes = f"an update takes about {each:.2g} s here and a comparison {updates} of them"
        found.append(Least(0.0, f"{takes}, more than {allowed}; raise --budget"))
    return found


def shared(left: float, waiting: Sequence[Least]) -> float:
    """Seconds of the first size that waits: its least, and an equal share of what all of them leave."""
    spare = left - sum(least.seconds for least in waiting)
    return waiting[0].seconds + max(0.0, spare) / sum(least.reason is None for least in waiting)


# ---------------------------------------------------------------- kernels per update


def between(names: Sequence[str], mark: str = MARK) -> list[list[str]]:
    """What ran between the first mark and the second, the third and the fourth, ..."""
    parts: list[list[str]] = []
    inside = False
    for name in names:
        if mark in name:
            inside = not inside
            parts += [[]] if inside else []
        elif inside:
            parts[-1].append(name)
    return parts


def counts(names: Sequence[str], updates: int) -> dict[str, float]:
    """Kernels, and copies and fills of memory, per update."""
    moved = sum(name.startswith(("Memcpy", "Memset")) for name in names)
    return {"kernels": (len(names) - moved) / updates, "copies": moved / updates}


def count_kernels(pairs: Sequence[Pair], deadline: float) -> None:
    """Profile one call of ours at each size: the replay of a graph, with the copies of its inputs.

    In one session for all: a second one may see nothing once graphs were captured after the first.
    """
    from torch.profiler import ProfilerActivity, profile

    def mark() -> None:
        torch.cuda._sleep(1000)
        torch.cuda.synchronize()

    ours = [(pair, name) for pair in pairs for name in OURS if name in pair.times]
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        for pair, name in ours:
            if time.perf_counter() > deadline:
                break
            provider = BUILDERS[name](pair.subject)
            repeated(provider, WARMUP["cuda"])
            mark()
            repeated(provider, 1)
            mark()
            del provider
            release("cuda")
    events = [event for event in seen.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    names = [event.name for event in sorted(events, key=lambda event: event.time_range.start)]
    for (pair, name), launched in zip(ours, between(names), strict=False):
        pair.kernels[name] = counts(launched, pair.subject.updates)


# ---------------------------------------------------------------- all sizes


def lines(pair: Pair) -> Iterator[str]:
    """The table of one size."""
    base = pair.base
    for place, name in enumerate(n for n in PROVIDERS if n in pair.times or n in pair.missing):
        head = f"{pair.subject.case if place == 0 else '':<30}"
        if name not in pair.times:
            yield f"{head}  {name:<10}{'-':>10}  {pair.missing[name]}"
            continue
        words = f"{head}  {name:<10}{1.0 / statistics.median(pair.times[name]):10.1f}"
        if base is None or name == base:
            words += " " * 23
        else:
            middle, low, high = pair.ratio(name, base)
            words += f"{middle:7.2f} ({f'{low:.2f} to {high:.2f})':<14}"
        over = pair.over_floor(name)
        words += "" if over is None else f"{over:7.2f}"
        if "products" not in pair.times and (floor := pair.floor(name)) is not None:
            words += f" of {floor * 1e6:.0f} us"
        yield words + (f"  {pair.notes[name]}" if name in pair.notes else "")
    if "parts_missing" in pair.parts:
        yield f"  no parts: {pair.parts['parts_missing']}"
    elif pair.parts:
        whole = sum(part["seconds"] for part in pair.parts["parts"])
        shares = [f"{part['part']} {part['seconds'] / whole:.0%}" for part in pair.parts["parts"]]
        yield f"  parts of ours: {', '.join(shares)}"


HEAD = f"{'case':<30}  provider   updates/s   x ours (quartiles)   x floor"


def shapes(
    workloads: Sequence[Workload], widths: Sequence[int], batches: Sequence[int]
) -> Iterator[Workload]:
    """The workloads, of CartpoleSwingup if there is none, at each width and batch size, or at their own."""
    for workload in workloads or (CARTPOLE,):
        for batch in batches or (workload.batch,):
            for width in widths or (workload.width,):
                yield workload._replace(width=width, batch=batch)


def run(
    device: str,
    providers: Sequence[str],
    widths: Sequence[int],
    batches: Sequence[int],
    *,
    seconds: float,
    workloads: Sequence[Workload] = (),
    updates: int | None = None,
    dry: bool = False,
    keep: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """Of each workload every width at the first batch size, then at the second, ..., until the time is up.

    Args:
        seconds: in all, once the limits of the machine are known; in equal shares of what is left, on a CPU
            beyond what each size takes at the least. updates: U; 1 on a CPU, 2 as published on a GPU.
        dry: no more than three rounds, and nothing that compiles for long.
        keep: called with what there is after each size.
    """
    cuda, limits = device == "cuda", limits_of(device, dry=dry)
    if not (cuda or dry):
        loaded()
    deadline = time.perf_counter() + seconds
    last = deadline - COUNTED * seconds if cuda else deadline
    machine = limits if cuda else None
    backend = "aot_eager" if dry else "inductor"
    subjects = [
        Subject(shape.width, shape.batch, updates or (2 if cuda else 1), device, backend, shape)
        for shape in shapes(workloads, widths, batches)
    ]
    plan = [Least(0.0)] * len(subjects)
    if not (cuda or dry):
        plan = planned(subjects, len(providers), seconds, limits)
    pairs: list[Pair] = []

    def found() -> dict[str, Any]:
        rows = [pair.row() for pair in pairs]
        return {
            "rows": rows,
            "equality": equality(wrong(rows) or uncompared(rows)),
            "not_reached": [subject.case for subject in subjects[len(pairs) :]],
            "machine": machine and machine._asdict(),
            "limits": limits._asdict(),
            "measurements": [one for pair in pairs for one in pair.measurements()],
        }

    print(HEAD, flush=True)
    with tensor_cores(device):
        for index, subject in enumerate(subjects):
            now = time.perf_counter()
            if pairs and now > last:
                break
            if (reason := plan[index].reason) is not None:
                pairs.append(Pair(subject, machine))
                pairs[-1].missing = dict.fromkeys(providers, reason)
            else:
                share = 0.0 if dry else shared(last - now, plan[index:])
                pairs.append(compare(subject, providers, share, machine, last, None if cuda else limits))
            print("\n".join(lines(pairs[-1])), flush=True)
            keep(found())
        if cuda:
            try:
                count_kernels(pairs, deadline)
            except RuntimeError as error:
                print(f"kernels were not counted: {told(error)}")
    result = found()
    print(f"limits of this machine: {limits.source}")
    if result["not_reached"]:
        print(f"not reached, time was up: {', '.join(result['not_reached'])}")
    keep(result)
    return result


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Updates per second of everybody, one line for each size."""
    names = [name for name in PROVIDERS if any(name in {**r["precision"], **r["missing"]} for r in rows)]
    ours = [name for name in names if name in OURS]
    head = [f"{'case':<30}", *(f"{name:>11}" for name in names)]
    head += [f"{f'floor of {name}':>20}" for name in ours]
    out = ["".join([*head, f"{'kernels':>9}"])]
    for row in rows:
        rate, floors = row["updates_per_second"], row["floor_seconds"]
        words = [f"{row['case']:<30}"]
        words += [f"{rate[name]:11.1f}" if name in rate else f"{'-':>11}" for name in names]
        for name in ours:
            floor = floors.get(name)
            words.append(f"{1.0 / floor:12.1f} ({1 / floor / rate[name]:4.2f}x)" if floor else f"{'-':>20}")
        counted = [
            row["kernels_per_update"][name]["kernels"] for name in ours if name in row["kernels_per_update"]
        ]
        out.append("".join([*words, f"{max(counted):9.1f}" if counted else f"{'-':>9}"]))
    return "\n".join(out)


def wrong(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Providers that computed something else, with sizes."""
    return [
        f"{name} at {row['case']} {reason}"
        for row in rows
        for name, reason in row["missing"].items()
        if reason.startswith(DIFFERS)
    ]


def uncompared(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The reason not to call results equal where no provider has a time."""
    return [] if any(row["updates_per_second"] for row in rows) else ["nothing was compared"]


def wanted(names: Sequence[str] | None, device: str) -> list[str]:
    """Providers in their order, ours always among them."""
    asked = set(names or DEFAULTS[device])
    if not asked & set(OURS):
        asked.add("ours")
    if device == "cuda" and "ours" in asked:
        asked = asked - {"ours"} | {"ours-tf32"}
    return [name for name in PROVIDERS if name in asked]


def asked(names: Sequence[str] | None, device: str) -> tuple[list[Workload], str | None]:
    """The workloads of these names; of no names all, without those that are too much for a CPU, and a line
    about these."""
    if names is None:
        return [], None
    if names:
        return [named(name) for name in names], None
    sizes = {w: taken(Subject(w.width, w.batch, workload=w), ["plain"]) for w in WORKLOADS.values()}
    heavy = {w.name: size for w, size in sizes.items() if device == "cpu" and size > HEAVY}
    told = ", ".join(f"{name} ({size / 1e9:.0f} GB)" for name, size in heavy.items())
    line = f"left out on a CPU for their memory, name them to run them: {told}" if heavy else None
    return [workload for workload in sizes if workload.name not in heavy], line


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, help="default: of the device")
    parser.add_argument("--workload", nargs="*", metavar="NAME", help=f"among {', '.join(WORKLOADS)}")
    parser.add_argument("--width", type=int, nargs="+", help="of the critics; 128 256 without a workload")
    parser.add_argument("--batch", type=int, nargs="+", help="128 without a workload")
    parser.add_argument("--updates", type=int, help="updates per call: 1 on a CPU, 2 on a GPU")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch, and of JAX if it is one")
    parser.add_argument(
        "--budget", type=float, default=60.0, help="seconds, once limits of this machine are known"
    )
    parser.add_argument("--save", help="name of a file under bench/results")
    arguments = parser.parse_args(words)
    if (reason := refusal(arguments)) is not None:
        print(f"bench_update: {reason}", file=sys.stderr)
        return 2
    there = torch.cuda.is_available()
    device = arguments.device or ("cuda" if there else "cpu")
    if device == "cuda" and not there:
        print("bench_update: torch sees no CUDA device", file=sys.stderr)
        return 2
    try:
        workloads, line = asked(arguments.workload, device)
    except ValueError as error:
        print(f"bench_update: {error}", file=sys.stderr)
        return 2
    if line is not None:
        print(line)
    if device == "cpu":
        torch.set_num_threads(arguments.threads)
        if arguments.threads == 1 and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # JAX takes every core it sees

    def keep(found: dict[str, Any]) -> None:
        if arguments.save:
            write(arguments.save, {"benchmark": "update", **found})

    found = run(
        device,
        wanted(arguments.providers, device),
        arguments.width or ([] if workloads else [128, 256]),
        arguments.batch or ([] if workloads else [128]),
        workloads=workloads,
        seconds=arguments.budget,
        updates=arguments.updates,
        keep=keep,
    )
    if device == "cuda":
        print(table(found["rows"]))
    if differing := wrong(found["rows"]) or uncompared(found["rows"]):
        print("\n".join(differing), file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main())
