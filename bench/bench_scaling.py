"""How the cost of an update grows with width, batch size and tasks, and that of a step with environments.

    python bench/bench_scaling.py [--device cpu|cuda] [--axes width batch tasks environments] [--dry]
        [--budget SECONDS] [--save NAME]

One axis after the other, the sizes of an axis in one process, interleaved. What the time is too short for is
left out evenly between the ends of an axis, but never what a fit of updates needs. Updates must agree with
plain PyTorch's at every size before any is timed. The floor of an update is that of bench_update.py. A step
is one of all environments of mjx/CartpoleSwingup, on the device that JAX has; nothing is known of its floor.

Through the medians goes `fixed + rate * x ** power` of least relative error, and its error is told. The power
of the width is fitted; that of the others is 1, for these are rows of the same work, or of the table. One
task has no embedding, so the line of the tasks begins at two.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import roofline
import torch
from bench_limits import machine
from bench_update import FLOOR, LONGEST
from harness import TIME_UP, Clock, Parser, Results, Unavailable, interleave, one_core, quartiles, wait
from workloads import named

from peers.updates import CARTPOLE, Provider, Subject, checked, expected, floor, release, tensor_cores

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
KEPT = {"cpu": 128, "cuda": 1024}  # width and batch size along the other axes
WEIGHTS = {"environments": 3}  # shares of the time; the others have 1
OURS = {"cpu": "ours", "cuda": "ours-bf16"}
TASK = "mjx/CartpoleSwingup"
POWERS = [step / 50 for step in range(25, 151)]  # 0.5 to 3


# ---------------------------------------------------------------- the curve


def fit(xs: Sequence[float], values: Sequence[float], power: float | None = None) -> dict[str, float] | None:
    """The curve of least relative error, without negative cost; None where there are too few points.

    Args:
        power: of x, where it is known; else the best of POWERS, which takes a point more.
    Returns:
        fixed, rate and power; residual, the root mean square of the relative errors at so many points.
    """
    if len(xs) < (3 if power is not None else 4):
        return None
    best, y, found = float("inf"), np.asarray(values), dict[str, float]()
    for each in POWERS if power is None else [power]:
        columns = np.stack([1.0 / y, np.asarray(xs) ** each / y], 1)
        for kept in ([0, 1], [0], [1]):  # least squares; alone where the other one would be negative
            part, *_ = np.linalg.lstsq(columns[:, kept], np.ones(len(y)), rcond=None)
            cost = np.zeros(2)
            cost[kept] = part
            residual = float(np.sqrt(np.mean((columns @ cost - 1.0) ** 2)))
            if (part >= 0.0).all() and residual < best:
                best = residual
                found = {"fixed": float(cost[0]), "rate": float(cost[1]), "power": each}
    return {**found, "residual": best, "points": len(y)}


def sentence(curve: Mapping[str, float]) -> str:
    power = "" if curve["power"] == 1.0 else f"^{curve['power']:.2f}"
    growth = f" + {1e6 * curve['rate']:.3g} us * x{power}" if curve["rate"] > 0.0 else ""
    return f"{1e6 * curve['fixed']:.3g} us{growth}, off by {100 * curve['residual']:.1f} % (root mean square)"


# ---------------------------------------------------------------- one axis


def spread(sizes: Sequence[int]) -> list[int]:
    """Both ends first, then always the middle of the widest gap."""
    places = [0, len(sizes) - 1][: len(sizes)]
    while len(places) < len(sizes):
        low, high = max(itertools.pairwise(sorted(places)), key=lambda gap: gap[1] - gap[0])
        places.append((low + high) // 2)
    return [sizes[place] for place in places]


def on_curve(axis: str, sizes: Iterable[int]) -> list[int]:
    return sorted(x for x in sizes if axis != "tasks" or x > 1)


def axis_of(
    found: Results,
    axis: str,
    sizes: Sequence[int],
    clock: Clock,
    make: Callable[[int], Mapping[str, Provider | Callable[[], object]]],
    kept: Mapping[str, Any],
    provider: str = "ours",
    roof: roofline.Machine | None = None,
    at: Callable[[int], Subject] | None = None,
) -> None:
    """Times of every size together, and the curve through them.

    make: what is timed at a size, by name: the first is ours, others are its floor.
    """
    what, updates = ("step", 1) if at is None else ("update", at(sizes[0]).updates)
    needs = 4 if axis == "width" else 3
    most = min(clock.left / 2, LONGEST[at(sizes[0]).device] if at else clock.left)  # for timing
    work, missing = dict[int, Mapping[str, Any]](), dict[int, BaseException]()
    for x in sizes:
        enough = len(on_curve(axis, work)) >= (needs if at else 1)
        try:
            if enough and clock.left <= most:
                raise Unavailable(TIME_UP)
            work[x] = make(x)
        except Exception as error:  # of one size: the others go on
            missing[x] = error
    calls = {(x, name): one for x, own in work.items() for name, one in own.items()}
    names = {f"{x} {name}": getattr(one, "call", one) for (x, name), one in calls.items()}
    ends = {f"{x} {name}": getattr(one, "finish", None) for (x, name), one in calls.items()}
    times = interleave(names, min(clock.left, most), finish=lambda name: ends[name] and ends[name]())
    each = {key: [t / updates for t in times[f"{key[0]} {key[1]}"]] for key in calls}
    for x in sorted(sizes):
        own = {name: values for (size, name), values in each.items() if size == x}
        floors: Any = FLOOR["cpu"]
        if roof is not None and at is not None and own:
            floors = {provider: roofline.floor(at(x).sizes, work[x][provider].precision, roof)}
        lost = {provider: missing[x]} if x in missing else {}
        found.case(f"{what}, {axis} {x}", own, "us", missing=lost, floor=floors)
    xs = on_curve(axis, work)
    medians = [quartiles(each[x, provider])[1] for x in xs]
    curve = fit(xs, medians, None if axis == "width" else 1.0)
    no_fit = f"too few sizes for a curve: {len(xs)} of at least {needs} have a time"
    print(f"{what} against {axis}: {sentence(curve) if curve else no_fit}")
    row = {"axis": axis, "what": what, "provider": provider, "kept": kept, "fit": curve}
    row["no_fit"] = None if curve else no_fit
    found.found["axes"].append(row)
    found.store()


def updates(
    found: Results, device: str, axis: str, sizes: Sequence[int], clock: Clock, kept: int, roof: Any
) -> None:
    def at(x: int) -> Subject:
        shape = {"width": kept, "batch": kept, "tasks": 1} | {axis: x}
        return Subject(BASE._replace(**shape), 2 if device == "cuda" else 1, device)

    def make(x: int) -> dict[str, Any]:
        subject = at(x)
        try:
            own: dict[str, Any] = {OURS[device]: checked(OURS[device], subject, expected(subject))}
            return own | ({FLOOR[device]: floor(subject)} if device == "cpu" else {})
        finally:
            release(device)

    others = {name: size for name, size in {"width": kept, "batch": kept, "tasks": 1}.items() if name != axis}
    axis_of(found, axis, spread(sizes), clock, make, others, OURS[device], roof, at)


def steps(found: Results, sizes: Sequence[int], clock: Clock) -> None:
    """A step of all environments, for every number of them."""
    from brc_fast.envs import make as make_env

    envs = list[Any]()

    def step(env: Any, actions: torch.Tensor) -> None:
        rewards = env.step_tensors(actions).rewards
        wait(rewards.device.type)
        rewards[0].item()

    def make(x: int) -> dict[str, Any]:
        envs.append(env := make_env(TASK, x, quiet=True))
        device = env.reset_tensors(0).device
        one = partial(step, env, 2.0 * torch.rand(x, env.action_size, device=device) - 1.0)
        one()  # compiles
        return {"ours": one}

    try:
        axis_of(found, "environments", sizes, clock, make, {"task": TASK})
    finally:
        for env in envs:
            env.close()


# ---------------------------------------------------------------- all axes


def run(found: Results, device: str, axes: Sequence[str], seconds: float, *, dry: bool = False) -> None:
    """One axis after the other, each with its share of the time. `dry`: tiny sizes."""
    sizes, kept = (DRY, 8) if dry else (SIZES[device], KEPT[device])
    roof = machine(device, dry=dry) if device == "cuda" else None
    found.found |= {"axes": [], "workload": BASE.name, "floor": FLOOR[device]}
    if device == "cpu":
        expected(
            Subject(CARTPOLE._replace(width=8, batch=8))
        )  # the first optimizer loads modules for seconds
    clock = Clock(seconds)
    with tensor_cores(device):
        for place, axis in enumerate(axes):
            waiting = sum(WEIGHTS.get(other, 1) for other in axes[place:])
            share = Clock(WEIGHTS.get(axis, 1) * clock.share(waiting))
            if axis == "environments":
                steps(found, sizes[axis], share)
            else:
                updates(found, device, axis, sizes[axis], share, kept, roof)


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.device()
    parser.add_argument("--axes", nargs="+", choices=tuple(DRY), default=tuple(DRY), help="default: all")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    parser.budget(120.0, "seconds; what starts and compiles may come on top")
    given = parser.parse_args(words)
    device = parser.device_of(given)
    if device == "cpu":
        one_core()
    found = Results("scaling", given.save, device=device)
    run(found, device, given.axes, given.budget, dry=given.dry)
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
