"""How the cost of an update grows with width, batch size and tasks, and that of a step with environments.

    python bench/bench_scaling.py [--device cpu|cuda] [--axes width batch tasks environments] [--dry]
        [--budget SECONDS] [--save NAME] [--picture FILE.png]

One axis after the other, the sizes of an axis in one process, interleaved. What the time is too short for is
left out evenly between the ends of an axis, but never what a fit of updates needs. Updates must agree with
plain PyTorch's at every size before any is timed. The floor of an update is that of bench_update.py. A step
is one of all environments of mjx/CartpoleSwingup, on the device that JAX has; nothing is known of its floor.

Through the medians goes `fixed + rate * x ** power` of least relative error, and its error is told. The power
of the width is fitted; that of the others is 1, for these are rows of the same work, or of the table. One
task has no embedding, so the line of the tasks begins at two.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fitting import Fit, fit
from harness import Measurement, absent, equality, interleave, measured, quartiles, refusal, wait, write
from machines import machine
from roofline import Machine
from update_providers import DIFFERS, Products, Provider, Subject, expected, loaded, release, tensor_cores
from update_timing import LONGEST, MOST, ROUND, Pair, ready, timed, told
from workloads import named

Sizes = Mapping[str, Sequence[int]]

BASE = named("dmc-single")
SIZES: dict[str, Sizes] = {  # of environments what matters most first: each is compiled
    "cpu": {
        "width": (64, 128, 192, 256, 384, 512),
        "batch": (32, 64, 128, 256, 512),
        "tasks": (1, 2, 4, 8, 16, 32, 64),
        "environments": (1024, 1, 64, 256, 16),
    },
    "cuda": {
        "width": (256, 512, 1024, 2048, 4096, 8192),
        "batch": (128, 256, 512, 1024, 2048, 4096),
        "tasks": (1, 2, 4, 8, 16, 32, 64),
        "environments": (4096, 1, 128, 1024, 16),
    },
}
DRY: Sizes = {"width": (8, 16, 24, 32), "batch": (4, 8, 16), "tasks": (1, 2, 3, 4), "environments": (1, 2, 3)}
AXES = tuple(DRY)
KEPT = {"cpu": (128, 128), "cuda": (1024, 1024)}  # width and batch size along the other axes
WEIGHTS = {"environments": 3}  # shares of the time; the others have 1
OURS = {"cpu": "ours", "cuda": "ours-bf16"}
TASK = "mjx/CartpoleSwingup"
TIME_UP = "time was up"


class Axis:
    """What was found along one axis: times in seconds, round by round, and floors, or reasons, by size."""

    def __init__(self, name: str, provider: str, kept: Mapping[str, int | str]) -> None:
        self.name, self.provider, self.kept = name, provider, kept
        self.what = "step" if name == "environments" else "update"
        self.times: dict[int, list[float]] = {}
        self.floors: dict[int, float] = {}
        self.missing: dict[int, str] = {}

    @property
    def needs(self) -> int:
        """Sizes that a fit takes."""
        return 4 if self.name == "width" else 3

    def on_curve(self, sizes: Iterable[int]) -> list[int]:
        """Those that the curve goes through."""
        return sorted(x for x in sizes if self.name != "tasks" or x > 1)

    @property
    def curve(self) -> Fit | None:
        xs = self.on_curve(self.times)
        medians = [quartiles(self.times[x])[1] for x in xs]
        return fit(xs, medians, None if self.name == "width" else 1.0)

    @property
    def no_curve(self) -> str | None:
        """Why there is no curve."""
        if self.curve is not None:
            return None
        told = f"{sentence(None)}: {len(self.on_curve(self.times))} of at least {self.needs} have a time"
        return told + ("; raise --budget" if TIME_UP in self.missing.values() else "")

    def measurements(self) -> list[Measurement]:
        out = []
        for x in sorted(self.times | self.missing):
            told = f"{self.what}, {self.name} {x}", self.provider
            if x in self.times:
                floor = self.floors[x] * 1e6 if x in self.floors else None
                out.append(measured(*told, [t * 1e6 for t in self.times[x]], "us", "less", floor))
            else:
                out.append(absent(*told, self.missing[x], "us", "less"))
        return out

    def row(self) -> dict[str, Any]:
        curve, sizes = self.curve, sorted(self.times)
        low, middle, high = (
            zip(*(quartiles(self.times[x]) for x in sizes), strict=True) if sizes else [()] * 3
        )
        return {
            "axis": self.name,
            "what": self.what,
            "provider": self.provider,
            "kept": dict(self.kept),
            "x": sizes,
            "seconds": middle,
            "low": low,
            "high": high,
            "floor": [self.floors.get(x) for x in sizes],
            "missing": self.missing,
            "fit": None if curve is None else curve._asdict(),
            "no_fit": self.no_curve,
        }

    def lines(self) -> list[str]:
        """The table of one axis."""
        kept = ", ".join(f"{name} {size}" for name, size in self.kept.items())
        out = [f"{self.what} against {self.name}; {kept}"]
        for x in sorted(self.times | self.missing):
            if x in self.missing:
                out.append(f"{x:8d}{'-':>12}  {self.missing[x]}")
                continue
            low, middle, high = (1e6 * t for t in quartiles(self.times[x]))
            words = f"{x:8d}{middle:12.0f} us ({low:.0f} to {high:.0f})"
            out.append(words + (f", floor {1e6 * self.floors[x]:.0f}" if x in self.floors else ""))
        return [*out, "  " + (self.no_curve or sentence(self.curve))]


def sentence(curve: Fit | None) -> str:
    if curve is None:
        return "too few sizes for a curve"
    power = "" if curve.power == 1.0 else f"^{curve.power:.2f}"
    growth = f" + {1e6 * curve.rate:.3g} us * x{power}" if curve.rate > 0.0 else ""
    return (
        f"{1e6 * curve.fixed:.3g} us{growth}, "
        f"off by {100 * curve.residual:.1f} % (root mean square of {curve.points} sizes)"
    )


# ---------------------------------------------------------------- what is timed


def subject(device: str, sizes: Mapping[str, int]) -> Subject:
    """U is as in bench_update.py."""
    workload = BASE._replace(width=sizes["width"], batch=sizes["batch"], tasks=sizes["tasks"])
    count = 2 if device == "cuda" else 1
    return Subject(workload.width, workload.batch, count, device, workload=workload)


def spread(sizes: Sequence[int]) -> list[int]:
    """Both ends first, then always the middle of the widest gap."""
    places = [0, len(sizes) - 1][: len(sizes)]
    while len(places) < len(sizes):
        taken = sorted(places)
        low, high = max(itertools.pairwise(taken), key=lambda gap: gap[1] - gap[0])
        places.append((low + high) // 2)
    return [sizes[place] for place in places]


def updates(
    axis: Axis, subjects: Mapping[int, Subject], seconds: float, roof: Machine | None, dry: bool
) -> None:
    """Ours at every size, and on a CPU its products, together; at as many as a fit needs in any case."""
    end = time.perf_counter() + seconds
    kept = min(seconds / 2, LONGEST[next(iter(subjects.values())).device])  # for timing
    pairs: dict[int, Pair] = {}
    providers: dict[str, Provider] = {}
    for x in spread(list(subjects)):
        subject = subjects[x]
        if len(axis.on_curve(pairs)) >= axis.needs and time.perf_counter() > end - kept:
            axis.missing[x] = TIME_UP
            continue
        pair = Pair(subject, roof)
        try:
            providers[f"{x}"] = ready(axis.provider, pair, expected(subject))
            if roof is None:
                providers[f"{x} products"] = Products(subject)
            pairs[x] = pair
        except Exception as error:  # of one size: the others go on
            axis.missing[x] = told(error)
        release(subject.device)
    if not pairs:
        return
    left = 0.0 if dry else max(0.0, end - time.perf_counter())
    found = timed(providers, next(iter(subjects.values())), left)
    for x, pair in pairs.items():
        axis.times[x] = found[f"{x}"]
        if roof is None:
            pair.times["products"] = found[f"{x} products"]
        if (floor := pair.floor(axis.provider)) is not None:
            axis.floors[x] = floor


def steps(axis: Axis, sizes: Sequence[int], seconds: float, dry: bool) -> None:
    """A step of all environments, for every number of them, together."""
    from brc_fast.envs import make

    end = time.perf_counter() + seconds
    work: dict[str, Callable[[], object]] = {}
    calls: dict[int, int] = {}
    envs = []

    def repeated(env: Any, actions: torch.Tensor, times: int) -> None:
        for _ in range(times):
            rewards = env.step_tensors(actions).rewards
        wait(rewards.device.type)
        rewards[0].item()

    for x in sizes:
        if work and time.perf_counter() > end:
            axis.missing[x] = TIME_UP
            continue
        try:
            env: Any = make(TASK, x, quiet=True)
            envs.append(env)
            device = env.reset_tensors(0).device
            one = partial(repeated, env, 2.0 * torch.rand(x, env.action_size, device=device) - 1.0)
            one(3)  # compiles
            start = time.perf_counter()
            one(1)
            calls[x] = max(1, min(MOST, int(ROUND / (time.perf_counter() - start))))
            work[f"{x}"] = partial(one, calls[x])
        except Exception as error:  # of one size: the others go on
            axis.missing[x] = told(error)
    try:
        if work:
            left = 0.0 if dry else max(0.0, end - time.perf_counter())
            found = interleave(work, seconds=left, calls=1, warmup=1)
            axis.times |= {x: [t / times for t in found[f"{x}"]] for x, times in calls.items()}
    finally:
        for env in envs:
            env.close()


# ---------------------------------------------------------------- all axes


def run(
    device: str,
    names: Sequence[str],
    *,
    seconds: float,
    dry: bool = False,
    keep: Callable[[dict[str, Any]], object] = lambda found: None,
) -> dict[str, Any]:
    """One axis after the other, each with its share of the time. `dry`: tiny sizes, three rounds."""
    if device == "cpu" and not dry:
        loaded()
    end, sizes, done = time.perf_counter() + seconds, DRY if dry else SIZES[device], list[Axis]()
    width, batch = (16, 8) if dry else KEPT[device]
    roof = machine(device, dry=dry) if device == "cuda" else None

    def found() -> dict[str, Any]:
        measurements = [one for axis in done for one in axis.measurements()]
        wrong = [f"{one['case']}: {one['missing']}" for one in measurements if "missing" in one]
        return {
            "axes": [axis.row() for axis in done],
            "workload": BASE.name,
            "device": device,
            "machine": roof and roof._asdict(),
            "equality": equality([reason for reason in wrong if DIFFERS in reason]),
            "measurements": measurements,
        }

    with tensor_cores(device):
        for place, name in enumerate(names):
            waiting = sum(WEIGHTS.get(other, 1) for other in names[place:])
            share = WEIGHTS.get(name, 1) * (end - time.perf_counter()) / waiting
            if name == "environments":
                axis = Axis(name, "ours", {"task": TASK})
                steps(axis, sizes[name], share, dry)
            else:
                kept = {"width": width, "batch": batch, "tasks": 1}
                axis = Axis(name, OURS[device], {key: size for key, size in kept.items() if key != name})
                subjects = {x: subject(device, kept | {name: x}) for x in sizes[name]}
                updates(axis, subjects, share, roof, dry)
            done.append(axis)
            print("\n".join(axis.lines()), flush=True)
            keep(found())
    return found()


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=AXES, help="default: all")
    parser.add_argument(
        "--budget", type=float, default=120.0, help="seconds; what starts and compiles may come on top"
    )
    parser.add_argument("--dry", action="store_true", help="tiny sizes, three rounds")
    parser.add_argument("--save", help="name of a file under bench/results")
    parser.add_argument("--picture", type=Path, help="PNG or SVG by the suffix")
    arguments = parser.parse_args(words)
    if (wrong := refusal(arguments)) is not None:
        print(f"bench_scaling: {wrong}", file=sys.stderr)
        return 2
    there = torch.cuda.is_available()
    device = arguments.device or ("cuda" if there else "cpu")
    if device == "cuda" and not there:
        print("bench_scaling: torch sees no CUDA device", file=sys.stderr)
        return 2
    if device == "cpu":
        torch.set_num_threads(1)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})  # JAX takes every core it sees

    def keep(found: dict[str, Any]) -> None:
        if arguments.save:
            write(arguments.save, {"benchmark": "scaling", **found})

    found = run(device, arguments.axes, seconds=arguments.budget, dry=arguments.dry, keep=keep)
    if arguments.picture:
        from harness import header
        from plot_scaling import draw

        draw({**header(), **found}, arguments.picture)
    if found["equality"] != "passed":
        print(found["equality"], file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
