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
for the libraries have no loop over tasks. --device is where the agent is whose actions come and whose
observations go; MJX runs on the same kind of device, the other simulators on the CPU.

--start measures from the start of a process to the end of the first step of an MJX task, with an empty cache
folder and again with what the first process left there.
"""

from __future__ import annotations

import importlib
import itertools
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from harness import (
    Clock,
    Differs,
    Missing,
    Parser,
    Results,
    Unavailable,
    interleave,
    positive,
    versions,
    wait,
)
from numpy.typing import NDArray

from brc_fast.envs import expand, make

TASKS = (
    "mjx/CartpoleSwingup", "mjx/CheetahRun", "gym/Pendulum-v1", "gym/HalfCheetah-v5", "dmc/dog-run",
    "envpool/DogRun-v1", "metaworld/reach-v3",
)  # fmt: skip
SLOTS = {"mjx": 64, "gym": 8, "dmc": os.cpu_count() or 1, "envpool": 8, "metaworld": 16}
SERIES = {"mjx/CartpoleSwingup": (16, 64, 256)}  # steps against slots, of one that compiles in seconds
SEVERAL = 4  # slots of each task of a suite
COMPARED = 10  # steps before timing
TOLERANCE = 1e-3  # of rewards, relative and absolute: programs of XLA differ in rounding
LONGEST = 10.0  # seconds of timing of a task; a quiet machine needs no more
ALONE = Unavailable("steps one task at a time; nothing to compare a suite with")
SIMULATORS = ("gymnasium", "dm-control", "shimmy", "envpool", "playground")

Actions = NDArray[np.float32]


class Library(NamedTuple):
    """The simulator's own loop, started as ours was."""

    step: Callable[[Any], Any]  # with one of `prepare`, waits for the end; returns the rewards [N]
    prepare: Callable[[Actions], Any]  # actions in [-1, 1] as the library takes them
    close: Callable[[], None] = lambda: None


# ---------------------------------------------------------------- the libraries' own loops


def playground(task: str, env: Any) -> Library:
    import jax
    from mujoco_playground import registry

    single = registry.load(task.partition("/")[2], config_overrides={"impl": "jax"})
    keys = jax.random.split(jax.random.fold_in(env.state_dict()["keys"][0], 0), env.num_envs)
    state = jax.jit(jax.vmap(single.reset))(keys)
    advance = jax.jit(jax.vmap(single.step), donate_argnums=0)

    def step(actions: Any) -> Any:
        nonlocal state
        state = jax.block_until_ready(advance(state, actions))
        return state.reward

    # A jitted function takes NumPy arrays faster than its own where both are in the host's memory.
    return Library(step, jax.device_put if jax.default_backend() == "gpu" else np.asarray)


def vectorized(task: str, env: Any, seeds: Sequence[int]) -> Library:
    import gymnasium
    from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

    name = task.partition("/")[2]
    name = f"shimmy:dm_control/{name}-v0" if task.startswith("dmc/") else name
    kind, options = SyncVectorEnv, dict[str, Any]()
    if isinstance(env.venv, AsyncVectorEnv):  # `fork` is not safe beside the threads of torch and JAX
        kind, options = AsyncVectorEnv, {"context": "forkserver"}
    factories = [partial(gymnasium.make, name)] * env.num_envs
    venv = kind(factories, autoreset_mode=AutoresetMode.SAME_STEP, **options)
    venv.reset(seed=list(seeds))
    return Library(lambda a: venv.step(a)[1], partial(scaled, space=venv.single_action_space), venv.close)


def pooled(maker: Callable[[], Any]) -> Library:
    pool = maker()
    pool.reset()
    return Library(lambda actions: pool.step(actions)[1], partial(scaled, space=pool.action_space))


def scaled(actions: Actions, space: Any) -> NDArray[Any]:
    share = (actions.astype(np.float64) + 1.0) / 2.0
    found: NDArray[Any] = (space.low + share * (space.high - space.low)).astype(space.dtype)
    return found


@contextmanager
def noted(owner: Any, name: str) -> Iterator[list[partial[Any]]]:
    """The calls of a function of another library in this block, to be made again."""
    function, calls = getattr(owner, name), list[partial[Any]]()

    def noting(*words: Any, **options: Any) -> Any:
        calls.append(partial(function, *words, **options))
        return calls[-1]()

    setattr(owner, name, noting)
    try:
        yield calls
    finally:
        setattr(owner, name, function)


def started(tasks: str, num_envs: int, device: str) -> Any:
    """Ours; Unavailable where MJX would run on another kind of device than the agent."""
    env = make(tasks, num_envs, quiet=True)
    if device == "cuda" and tasks.startswith("mjx/"):
        import jax

        if (backend := jax.default_backend()) != "gpu":
            env.close()
            raise Unavailable(f"JAX sees no GPU, its backend is {backend}; install jax[cuda12]")
    return env


def both(task: str, num_envs: int, device: str) -> tuple[Any, Library]:
    """Ours after a reset, and the library's in the same start states."""
    backend = task.partition("/")[0]
    if backend in ("envpool", "metaworld"):
        with suppress(ImportError), noted(importlib.import_module("envpool"), "make_gymnasium") as pools:
            env = started(task, num_envs, device)
            env.reset_tensors(0)
            return env, pooled(pools[-1])
    env = started(task, num_envs, device)
    try:
        if backend == "mjx":
            env.reset_tensors(0)
            return env, playground(task, env)
        with noted(env.venv, "reset") as resets:
            env.reset_tensors(0)
        return env, vectorized(task, env, resets[0].keywords["seed"])
    except BaseException:
        env.close()
        raise


# ---------------------------------------------------------------- what is timed


def compare(found: Results, task: str, num_envs: int, seconds: float, device: str = "cpu") -> None:
    """One case, actions from torch on `device`; a suite is stepped by ours alone."""
    clock, count = Clock(seconds), len(expand(task))
    slots, missing, work = num_envs * count, Missing(), dict[str, Callable[[], object]]()
    shown: Any = {"case": f"{task} num_envs={slots}", "unit": "steps/s"}
    shown["at"] = {"steps/s": task, "slots": slots}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the simulators, on bounds and versions
            made = (task, num_envs, device)
            env, library = (started(*made), None) if count > 1 else both(*made)
    except (ImportError, ValueError, Unavailable) as error:
        found.case(times={}, missing=dict.fromkeys(("ours", "library"), error), **shown)
        return
    try:
        shape = (16, slots, env.action_size)
        actions = list(np.random.default_rng(0).uniform(-1.0, 1.0, shape).astype(np.float32))
        tensors = itertools.cycle([torch.from_numpy(action).to(device) for action in actions])

        def ours() -> None:
            rewards = env.step_tensors(next(tensors)).rewards
            wait(rewards.device.type)
            rewards[0].item()

        if library is None:
            env.reset_tensors(0)
            missing["library"] = ALONE
        else:
            check(env, library, actions)
            prepared = itertools.cycle([library.prepare(action) for action in actions])
            work["library"] = lambda: library.step(next(prepared))
        work = {"ours": ours, **work}
        for one in [*work.values()] * 2:
            one()  # compiles; JAX perhaps once more
        times = interleave(work, min(LONGEST, clock.left))
        found.case(times=times, scale=slots, ours="ours", missing=missing, **shown)
    except Differs as error:
        found.case(times={}, missing=dict.fromkeys(("ours", "library"), error), **shown)
    finally:
        env.close()
        if library is not None:
            library.close()


def check(env: Any, library: Library, actions: Sequence[Actions]) -> None:
    for number, action in enumerate(actions[:COMPARED], start=1):
        ours = env.step_tensors(torch.from_numpy(action)).rewards.cpu().numpy()
        theirs = np.asarray(library.step(library.prepare(action)))
        if not np.allclose(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE):
            raise Differs(f"differs in step {number}: rewards {ours[:3]}, the library's {theirs[:3]}")


def usual(task: str) -> Sequence[int]:
    """Slots of a task, or of each of a suite, where none are asked for."""
    if len(expand(task)) > 1:
        return (SEVERAL,)
    return SERIES.get(task, (SLOTS.get(task.partition("/")[0], 8),))


FIRST_STEP = """
import torch
from brc_fast.envs import make
env = make({task!r}, {num_envs}, quiet=True)
env.reset_tensors(0)
env.step_tensors(torch.zeros(env.num_envs, env.action_size)).rewards[0].item()
print("stepped", flush=True)
"""


def start(found: Results, task: str, num_envs: int) -> None:
    """Seconds to the first step of a first process and of a second: of one start each."""
    times = {}
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "XDG_CACHE_HOME": folder}
        environment.pop("JAX_COMPILATION_CACHE_DIR", None)
        words = [sys.executable, "-c", FIRST_STEP.format(task=task, num_envs=num_envs)]
        for name in ("first process", "second"):
            begin = time.perf_counter()
            with subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                stepped = process.stdout.readline().strip() == "stepped"
                times[name] = [time.perf_counter() - begin]
            if not stepped:
                raise RuntimeError(f"{task} made no step, exit code {process.returncode}")
    at = {"seconds to the first step": task, "slots": num_envs}
    found.case(f"{task} num_envs={num_envs}", times, "s", at=at)


def main(words: Sequence[str] | None = None) -> int:
    parser = Parser(__doc__)
    parser.common(120.0, workloads="+")
    parser.add_argument("--tasks", nargs="+", default=[], help=f"or suites; default: {' '.join(TASKS)}")
    told = f"slots; default: {SERIES | SLOTS}"
    parser.add_argument("--num-envs", type=positive, nargs="+", default=[], help=told)
    parser.add_argument("--start", action="store_true", help="time the start of a process")
    given = parser.parse_args(words)
    device = parser.device(given)
    asked = [*given.tasks, *(workload.suite for workload in given.workload or ())]
    try:
        [expand(task) for task in asked]
    except ValueError as error:
        parser.error(f"{error}")
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"  # else JAX takes a GPU that it sees
    with suppress(ImportError):
        import mujoco

        mujoco.set_mju_user_warning(lambda message: None)  # else on the terminal and in a file in this folder
    found = Results("envs", given.save, device=device, simulators=versions(SIMULATORS))
    if given.start:
        for task, slots in itertools.product(asked or TASKS[:1], given.num_envs or [SLOTS["mjx"]]):
            start(found, task, slots)
        return found.end()
    clock, pairs = Clock(given.budget), [(t, n) for t in asked or TASKS for n in given.num_envs or usual(t)]
    for place, (task, slots) in enumerate(pairs):
        compare(found, task, slots, clock.left / (len(pairs) - place), device)
    return found.end()


if __name__ == "__main__":
    sys.exit(main())
