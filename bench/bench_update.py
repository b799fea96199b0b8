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
limits (machines.py). On a CPU a tenth of the time goes into measuring the parts of ours (update_parts.py). A
size is left out there, with the reason, where the roofline tells that a comparison takes longer than the
budget, and torch.compile where less of the budget is left than compiling takes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import roofline
import torch
import update_timing as timing
from harness import equality, refusal, write
from machines import machine as limits_of
from update_counts import count_kernels
from update_providers import (
    CARTPOLE,
    DIFFERS,
    OURS,
    PROVIDERS,
    Subject,
    loaded,
    taken,
    tensor_cores,
    too_large,
)
from update_timing import COUNTED, ROUNDS, WARMUP, Pair, told
from workloads import WORKLOADS, Workload, named

DEFAULTS = {"cpu": ("ours", "plain"), "cuda": ("ours-bf16", "ours-tf32", "plain", "compiled", "jax")}
HEAVY = 4e9  # bytes of plain PyTorch; a CPU is not given more unless it is asked to


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


HEAD = f"{'case':<30}  provider   updates/s   x ours (quartiles)   x "
FLOORS = {"cpu": "torch.bmm", "cuda": "roofline"}


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
        loaded(providers)
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

    print(HEAD + FLOORS[device], flush=True)
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
                pairs.append(
                    timing.compare(subject, providers, share, machine, last, None if cuda else limits)
                )
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
