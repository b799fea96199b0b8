"""How the cost of an update grows with width, batch size and tasks, and that of a step with environments.

    python bench/bench_scaling.py [--device cpu|cuda] [--dry] [--budget SECONDS] [--save NAME]

Updates must agree with plain PyTorch's at every size before they are timed; their floor is that of
bench_update.py. A step is one of all environments of mjx/CartpoleSwingup, on the device that JAX has; nothing
is known of its floor.

Through the medians goes `fixed + rate * x ** power` of least relative error, and its error is told. The power
of the width is fitted; that of the others is 1, for these are rows of the same work, or of the table. One
task has no embedding, so the line of the tasks begins at two.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import harness
import numpy as np
import torch
from bench_update import UPDATES, compare, prepare
from harness import TIME_UP, Clock, Missing, Parser, Results, Unavailable, interleave, shares
from workloads import WORKLOADS

from peers.updates import Subject

BASE, TASK = WORKLOADS["dmc-single"], "mjx/CartpoleSwingup"
TASKS = (1, 2, 4, 8, 16, 32, 64)
CPU = {"width": (64, 128, 192, 256, 384, 512), "batch": (32, 64, 128, 256, 512), "tasks": TASKS}
CUDA = {
    "width": (256, 512, 1024, 2048, 4096, 8192),
    "batch": (128, 256, 512, 1024, 2048, 4096),
    "tasks": TASKS,
}
SIZES = {
    "cpu": {**CPU, "environments": (1, 16, 64, 256, 1024)},
    "cuda": {**CUDA, "environments": (1, 16, 128, 1024, 4096)},
}
DRY = {"width": (8, 16, 24, 32), "batch": (4, 8, 16), "tasks": (1, 2, 3, 4), "environments": (1, 2, 3)}
KEPT = {"cpu": 128, "cuda": 1024}  # width and batch size along the other axes
OURS = {"cpu": "ours", "cuda": "ours-bf16"}
POWERS = [step / 50 for step in range(25, 151)]  # 0.5 to 3


def fit(xs: Sequence[float], values: Sequence[float], power: float | None = None) -> dict[str, float] | None:
    """The curve of least relative error, without negative cost; None where there are too few points.

    Args:
        power: of x, where it is known; else the best of POWERS, which takes a point more.
    Returns:
        fixed, rate and power; residual, the root mean square of the relative errors at so many points.
    """
    if len(xs) < (3 if power is not None else 4):
        return None
    best, y = {"residual": float("inf")}, np.asarray(values)
    for each in POWERS if power is None else [power]:
        columns = np.stack([1.0 / y, np.asarray(xs) ** each / y], 1)
        for kept in ([0, 1], [0], [1]):  # least squares; alone where the other one would be negative
            cost = np.zeros(2)
            cost[kept] = np.linalg.lstsq(columns[:, kept], np.ones(len(y)), rcond=None)[0]
            residual = float(np.sqrt(np.mean((columns @ cost - 1.0) ** 2)))
            if (cost >= 0.0).all() and residual < best["residual"]:
                fixed, rate = map(float, cost)
                best = {"fixed": fixed, "rate": rate, "power": each, "residual": residual, "points": len(y)}
    return best


def step(found: Results, case: str, count: int, clock: Clock) -> None:
    """One of so many environments, waited for."""
    missing, times = Missing(), dict[str, list[float]]()
    with missing.of("ours"):
        from brc_fast.envs import make

        env = make(TASK, count, quiet=True)
        device = env.reset_tensors(0).device
        actions = 2.0 * torch.rand(count, env.action_size, device=device) - 1.0
        times = interleave({"ours": lambda: env.step_tensors(actions).rewards[0].item()}, clock.left)
        env.close()
    found.case(case, times, "us", missing=missing)


def run(found: Results, device: str, axes: Sequence[str], seconds: float, *, dry: bool = False) -> None:
    """One axis after the other, in equal shares of the time."""
    sizes, kept = (DRY, 8) if dry else (SIZES[device], KEPT[device])
    prepare(found, device)
    found.found |= {"axes": [], "workload": BASE.name}
    for axis, own in shares(axes, seconds):
        what, known = "step" if axis == "environments" else "update", dict[int, float]()
        for x, share in shares(sizes[axis], own.left):
            case = f"{what}, {axis} {x}"
            if share.left == 0.0 and known and not dry:
                found.case(case, {}, "us", missing={OURS[device]: Unavailable(TIME_UP)})
            elif what == "step":
                step(found, case, x, share)
            else:
                shape = BASE._replace(**({"width": kept, "batch": kept} | {axis: x}))
                subject = Subject(shape, UPDATES[device], device)
                compare(found, subject, [OURS[device]], share, case=case, unit="us")
            if found.entries[-1]["value"] and (axis != "tasks" or x > 1):
                known[x] = found.entries[-1]["value"] / 1e6
        curve = fit(list(known), list(known.values()), None if axis == "width" else 1.0)
        print(f"{what} against {axis}: {curve or 'too few sizes have a time for a curve; raise --budget'}")
        found.found["axes"].append({"axis": axis, "what": what, "fit": curve})
        found.store()


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(120.0)
    given = parser.parse_args(words)
    if (device := parser.device(given)) == "cpu":
        harness.use_cores()
    found = Results("scaling", given.save, device=device)
    run(found, device, tuple(DRY), given.budget, dry=given.dry)
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
