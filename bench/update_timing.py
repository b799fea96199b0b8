"""One size of `bench_update.py`: providers are built, compared with plain PyTorch, and timed in turns."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import roofline
import torch
from harness import Measurement, absent, interleave, measured, median_ratio, quartiles
from update_parts import measured_parts
from update_providers import (
    BUILDERS,
    OURS,
    PROVIDERS,
    Expected,
    Products,
    Provider,
    Subject,
    Unavailable,
    compiling,
    difference,
    expected,
    fits,
    out_of_memory,
    release,
    too_large,
)

WARMUP = {"cpu": 1, "cuda": 5}  # calls: ours captures its two graphs in the second and the third
ROUND = 0.05  # seconds of a provider's calls in one round, if these are at least one and at most MOST
MOST = 100
ROUNDS = 3  # at least
LONGEST = {"cpu": float("inf"), "cuda": 4.0}  # seconds of timing at one size; a quiet machine needs no more
COUNTED = 0.1  # share of the time that is kept: on a GPU for counting kernels, on a CPU for parts
PARTS_UPDATES, PARTS_FREE = 2 + 2 * ROUNDS, 1.0  # at least of the parts; seconds of them that may come on top

Times = dict[str, list[float]]


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
        """Seconds of an update by the roofline; on a CPU of its products alone by torch.bmm."""
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
    for name in sorted(names, key=partial(compiling, pair.subject)):  # what takes long takes no other's time
        now, takes = time.perf_counter(), compiling(pair.subject, name)
        if (pair.times or providers) and now > deadline:
            pair.missing[name] = "time was up"
            continue
        if takes > max(0.0, start + seconds - now):
            short = f"compiling takes about {takes:.0f} s, more than this size has of the budget"
            pair.missing[name] = f"{short}; raise --budget"
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
