"""Steps per second of our environments and of the same simulators driven by their own loop.

    python bench/bench_envs.py [--tasks TASK ...] [--workload NAME ...] [--num-envs N ...] [--device cpu|cuda]
        [--budget SECONDS] [--save NAME]
    python bench/bench_envs.py --start [--tasks TASK] [--num-envs N] [--save NAME]

ours      `brc_fast.envs.make`: tensors, true successors, ended slots started again
library   mjx: Playground's step in jit(vmap), state donated, nothing restarted, waited for once per step
          gym, dmc: Gymnasium's SyncVectorEnv and AsyncVectorEnv, whichever ours runs in
          envpool, metaworld: the pool's own `step`

Both run in one process, interleaved, with the same actions; before timing, their rewards over the first steps
from the same start must agree. A step is that of one slot. A suite of several tasks is stepped by ours alone,
for the libraries have no loop over tasks.

--workload steps the tasks of a workload (workloads.py). --device is where the agent is whose actions come and
whose observations go; MJX runs on the same kind of device, the other simulators on the CPU.

--start measures from the start of a process to the end of the first step of an MJX task, with an empty cache
folder and again with what the first process left there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import Measurement, absent, equality, interleave, measured, median_ratio, refusal, wait, write
from numpy.typing import NDArray
from workloads import WORKLOADS, named

from brc_fast.envs import expand, make

TASKS = (
    "mjx/CartpoleSwingup",
    "mjx/CheetahRun",
    "gym/Pendulum-v1",
    "gym/HalfCheetah-v5",
    "dmc/dog-run",
    "envpool/DogRun-v1",
    "metaworld/reach-v3",
)
SLOTS = {"mjx": 64, "gym": 8, "dmc": os.cpu_count() or 1, "envpool": 8, "metaworld": 16}
SERIES = {"mjx/CartpoleSwingup": (16, 64, 256)}  # steps against slots, of one that compiles in seconds
SEVERAL = 4  # slots of each task of a suite
COMPARED = 10  # steps before timing
TOLERANCE = 1e-3  # of rewards, relative and absolute: programs of XLA differ in rounding
ROUND = 0.05  # seconds of a provider's steps in one round
LONGEST = 10.0  # seconds of timing of a task; a quiet machine needs no more
UNIT, PROVIDERS = "steps/s", ("ours", "library")
ALONE = "steps one task at a time; nothing to compare a suite with"
SIMULATORS = ("gymnasium", "dm-control", "shimmy", "envpool", "playground")

Actions = NDArray[np.float32]


class Differs(Exception):
    """What ours and the library's rewards are where they part."""


class Library(NamedTuple):
    """The simulator's own loop, started as ours was."""

    step: Callable[[Any], Any]  # with one of `prepared`, waits for the end; returns the rewards [N]
    prepare: Callable[[Actions], Any]  # actions in [-1, 1] as the library takes them
    close: Callable[[], None]


# ---------------------------------------------------------------- the libraries' own loops


def _playground(task: str, env: Any) -> Library:
    import jax

    from brc_fast.envs._playground import _load

    playground = _load(task.partition("/")[2], "jax")
    keys = jax.random.split(jax.random.fold_in(env._keys[0], 0), env.num_envs)
    state = jax.jit(jax.vmap(playground.reset))(keys)
    advance = jax.jit(jax.vmap(playground.step), donate_argnums=0)

    def step(actions: Any) -> Any:
        nonlocal state
        state = jax.block_until_ready(advance(state, actions))
        return state.reward

    # A jitted function takes NumPy arrays faster than its own where both are in the host's memory.
    prepare = jax.device_put if jax.default_backend() == "gpu" else np.asarray
    return Library(step, prepare, lambda: None)


def _gymnasium(task: str, env: Any, seeds: Sequence[int]) -> Library:
    import gymnasium
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

    name = task.partition("/")[2]
    if task.startswith("dmc/"):
        name = f"shimmy:dm_control/{name}-v0"
    factories = [partial(gymnasium.make, name)] * env.num_envs
    venv: Any
    if isinstance(env.venv, AsyncVectorEnv):
        # `fork` is not safe beside the threads of torch and JAX.
        venv = AsyncVectorEnv(factories, autoreset_mode=AutoresetMode.SAME_STEP, context="forkserver")
    else:
        venv = SyncVectorEnv(factories, autoreset_mode=AutoresetMode.SAME_STEP)
    venv.reset(seed=list(seeds))
    space = venv.single_action_space
    return Library(lambda actions: venv.step(actions)[1], partial(_scaled, space=space), venv.close)


def _envpool(_: str, env: Any, seeds: Sequence[int]) -> Library:
    pool = env.venv._make(seed=list(seeds))
    pool.reset()
    space = pool.action_space
    return Library(lambda actions: pool.step(actions)[1], partial(_scaled, space=space), lambda: None)


def _scaled(actions: Actions, space: Any) -> NDArray[Any]:
    share = (actions.astype(np.float64) + 1.0) / 2.0
    scaled: NDArray[Any] = (space.low + share * (space.high - space.low)).astype(space.dtype)
    return scaled


def _recording(seeded: Callable[..., Any], seeds: list[int]) -> Callable[..., Any]:
    """The same call, which notes the seeds that it is given."""

    def recording(seed: Sequence[int]) -> Any:
        seeds.extend(seed)
        return seeded(seed=seed) if isinstance(seeded, partial) else seeded(seed)

    return recording


def _made(tasks: str, num_envs: int, device: str) -> Any:
    """Ours; ValueError where MJX would run on another kind of device than the agent."""
    env = make(tasks, num_envs, quiet=True)
    if device == "cuda" and tasks.startswith("mjx/"):
        import jax

        if (backend := jax.default_backend()) != "gpu":
            env.close()
            raise ValueError(
                f"JAX sees no GPU, its backend is {backend}; install jax[cuda12], or --device cpu"
            )
    return env


def _both(task: str, num_envs: int, device: str) -> tuple[Any, Library]:
    """Ours after a reset, and the library's in the same start states."""
    env = _made(task, num_envs, device)
    backend = task.partition("/")[0]
    try:
        if backend == "mjx":
            env.reset_tensors(0)
            return env, _playground(task, env)
        seeds: list[int] = []
        pooled = hasattr(env.venv, "_make")
        owner, name = (env.venv, "_make") if pooled else (env, "_start")
        seeded = getattr(owner, name)
        setattr(owner, name, _recording(seeded, seeds))
        env.reset_tensors(0)
        setattr(owner, name, seeded)
        return env, (_envpool if pooled else _gymnasium)(task, env, seeds)
    except BaseException:
        env.close()
        raise


# ---------------------------------------------------------------- one task


def _check(task: str, env: Any, library: Library, actions: Sequence[Actions]) -> None:
    for number, action in enumerate(actions[:COMPARED], start=1):
        ours = env.step_tensors(torch.from_numpy(action)).rewards.cpu().numpy()
        theirs = np.asarray(library.step(library.prepare(action)))
        if not np.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE):
            raise Differs(f"differs in step {number}: rewards {ours[:3]}, the library's {theirs[:3]}")


def compare(task: str, num_envs: int, seconds: float, device: str = "cpu") -> dict[str, Any]:
    """One row, actions from torch on `device`; `missing` holds the reason where nothing was timed."""
    row: dict[str, Any] = {"task": task, "num_envs": num_envs}
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the simulators, on bounds and versions
            env, library = _both(task, num_envs, device)
    except (ImportError, ValueError) as error:
        return {**row, "missing": str(error)}
    try:
        generator = np.random.default_rng(0)
        shape = (16, num_envs, env.action_size)
        actions = list(generator.uniform(-1.0, 1.0, shape).astype(np.float32))
        _check(task, env, library, actions)
        tensors = [torch.from_numpy(action).to(device) for action in actions]
        prepared = [library.prepare(action) for action in actions]

        def ours(steps: int) -> None:
            for number in range(steps):
                env.step_tensors(tensors[number % 16]).rewards[0].item()  # waits

        def theirs(steps: int) -> None:
            for number in range(steps):
                library.step(prepared[number % 16])

        ours(2)
        theirs(2)  # JAX may compile once more
        begin = time.perf_counter()
        ours(5)
        theirs(5)
        steps = max(1, int(ROUND * 10 / (time.perf_counter() - begin)))
        left = min(LONGEST, seconds - (time.perf_counter() - start))
        work = {"ours": partial(ours, steps), "library": partial(theirs, steps)}
        times = interleave(work, seconds=max(0.0, left), calls=1, warmup=1)
    except Differs as error:
        return {**row, "missing": str(error)}
    finally:
        env.close()
        library.close()
    each = {name: [num_envs * steps / value for value in values] for name, values in times.items()}
    ratio = median_ratio(times["library"], times["ours"])
    return {
        **row,
        "steps_per_second": {name: statistics.median(values) for name, values in each.items()},
        "times_library": ratio,
        "rounds": len(times["ours"]),
        "measurements": [measured(case_of(row), name, values, UNIT, "more") for name, values in each.items()],
    }


def alone(suite: str, slots: int, seconds: float, device: str = "cpu") -> dict[str, Any]:
    """The row of ours, with so many slots of each task, side by side."""
    row: dict[str, Any] = {"task": suite, "num_envs": slots * len(expand(suite))}
    start, times = time.perf_counter(), list[float]()
    try:
        env = _made(suite, slots, device)
    except (ImportError, ValueError) as error:
        return {**row, "missing": str(error)}
    try:
        env.reset_tensors(0)
        actions = torch.zeros(env.num_envs, env.action_size, device=device)
        wait(env.step_tensors(actions).observations.device.type)
        started = time.perf_counter() - start
        while time.perf_counter() - start < min(started + LONGEST, seconds) or len(times) < 3:
            begin = time.perf_counter()
            for _ in range(10):
                observations = env.step_tensors(actions).observations
            wait(observations.device.type)
            times.append((time.perf_counter() - begin) / 10)
    finally:
        env.close()
    rates = [env.num_envs / took for took in times]
    entries = [
        measured(case_of(row), "ours", rates, UNIT, "more"),
        absent(case_of(row), "library", ALONE, UNIT, "more"),
    ]
    rate = {"ours": statistics.median(rates)}
    return {**row, "steps_per_second": rate, "start_seconds": started, "measurements": entries}


def case_of(row: Mapping[str, Any]) -> str:
    return f"{row['task']} num_envs={row['num_envs']}"


def collected(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is stored of rows: themselves, their measurements in one list, and whether rewards agreed."""
    entries: list[Measurement] = []
    for row in rows:
        entries += row.pop("measurements", [])
        if "missing" in row:
            entries += [absent(case_of(row), who, row["missing"], UNIT, "more") for who in PROVIDERS]
    differing = [f"{case_of(row)} {row['missing']}" for row in rows if differs(row)]
    return {"rows": list(rows), "measurements": entries, "equality": equality(differing)}


def differs(row: Mapping[str, Any]) -> bool:
    return str(row.get("missing", "")).startswith("differs")


HEAD = f"{'task':<24}{'slots':>6}{'ours':>12}{'library':>12}   x library (quartiles)"


def line(row: dict[str, Any]) -> str:
    head = f"{row['task']:<24}{row['num_envs']:6d}"
    if "missing" in row:
        return f"{head}{'-':>12}{'-':>12}   {row['missing']}"
    rates = row["steps_per_second"]
    if "times_library" not in row:
        return f"{head}{rates['ours']:12.0f}{'-':>12}   library: {ALONE}"
    middle, low, high = row["times_library"]
    return f"{head}{rates['ours']:12.0f}{rates['library']:12.0f}{middle:8.2f} ({low:.2f} to {high:.2f})"


def usual(task: str) -> Sequence[int]:
    """Slots of a task, or of each of a suite, where none are asked for."""
    if len(expand(task)) > 1:
        return (SEVERAL,)
    return SERIES.get(task, (SLOTS.get(task.partition("/")[0], 8),))


def run(
    tasks: Sequence[str], num_envs: Sequence[int], seconds: float, device: str = "cpu"
) -> list[dict[str, Any]]:
    """Every task or suite with every number of slots, or its own, in equal shares of the time left."""
    end = time.perf_counter() + seconds
    rows: list[dict[str, Any]] = []
    pairs = [(task, n) for task in tasks for n in num_envs or usual(task)]
    print(HEAD, flush=True)
    for place, (task, slots) in enumerate(pairs):
        share = (end - time.perf_counter()) / (len(pairs) - place)
        kind = compare if len(expand(task)) == 1 else alone
        rows.append(kind(task, slots, share, device))
        print(line(rows[-1]), flush=True)
    return rows


# ---------------------------------------------------------------- the start of a process

FIRST_STEP = """
import torch
from brc_fast.envs import make
env = make({task!r}, {num_envs}, quiet=True)
env.reset_tensors(0)
env.step_tensors(torch.zeros(env.num_envs, env.action_size)).rewards[0].item()
print("stepped", flush=True)
"""


def start(task: str, num_envs: int) -> dict[str, Any]:
    """Seconds to the first step of a first process and of a second."""
    seconds = []
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        code = FIRST_STEP.format(task=task, num_envs=num_envs)
        for _ in range(2):
            begin = time.perf_counter()
            with subprocess.Popen(
                [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True
            ) as process:
                assert process.stdout is not None
                stepped = process.stdout.readline().strip() == "stepped"
                seconds.append(time.perf_counter() - begin)
            if not stepped:
                raise RuntimeError(f"{task} made no step, exit code {process.returncode}")
    first, second = seconds
    print(f"{task}, {num_envs} slots: first process {first:.1f} s, second {second:.1f} s")
    return {"task": task, "num_envs": num_envs, "first": first, "second": second, "ratio": first / second}


def started(row: Mapping[str, Any]) -> list[Measurement]:
    """Of one start each: there is no spread."""
    return [
        measured(f"{case_of(row)} {n} process", "ours", [row[n]], "s", "less") for n in ("first", "second")
    ]


def simulators() -> dict[str, str]:
    found = {}
    for name in SIMULATORS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    parser.add_argument("--tasks", nargs="+", help=f"or suites; default: {' '.join(TASKS)}")
    parser.add_argument("--workload", nargs="+", metavar="NAME", help=f"among {', '.join(WORKLOADS)}")
    parser.add_argument(
        "--num-envs", type=int, nargs="+", default=[], help=f"slots; default: {SERIES | SLOTS}"
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=120.0,
        help="seconds; starts come on top: MJX compiles for up to a minute",
    )
    parser.add_argument("--start", action="store_true", help="time the start of a process")
    parser.add_argument("--save", help="name of a file under bench/results")
    arguments = parser.parse_args(words)
    if (wrong := refusal(arguments)) is not None:
        print(f"bench_envs: {wrong}", file=sys.stderr)
        return 2
    there = torch.cuda.is_available()
    device = arguments.device or ("cuda" if there else "cpu")
    if device == "cuda" and not there:
        print("bench_envs: torch sees no CUDA device", file=sys.stderr)
        return 2
    try:
        asked = [*(arguments.tasks or ()), *(named(name).suite for name in arguments.workload or ())] or TASKS
        for task in asked:
            expand(task)
    except ValueError as error:
        print(f"bench_envs: {error}", file=sys.stderr)
        return 2
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # else JAX takes a GPU that it sees
    with suppress(ImportError):
        import mujoco

        mujoco.set_mju_user_warning(lambda message: None)  # else on the terminal and in a file in this folder
    if arguments.start:
        tasks = TASKS[:1] if asked is TASKS else asked
        slots = arguments.num_envs or [SLOTS["mjx"]]
        starts = [start(task, number) for task in tasks for number in slots]
        result = {"starts": starts, "measurements": [entry for row in starts for entry in started(row)]}
    else:
        result = collected(run(asked, arguments.num_envs, arguments.budget, device))
    if arguments.save:
        write(arguments.save, {"benchmark": "envs", "device": device, "simulators": simulators(), **result})
    return 1 if any(differs(row) for row in result.get("rows", [])) else 0


if __name__ == "__main__":
    sys.exit(main())
